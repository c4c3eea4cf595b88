"""The MCP server: what its tools answer, and that nothing outside the folder is read."""

import asyncio
import dataclasses
import json

import numpy
import pytest
import torch

import diag
from diag.errors import InvalidInput
from diag.integrations.mcp import Runs, mcp_server
from diag.run.writer import RunWriter
from diag.snapshot.history import empty_history


@pytest.fixture
def folder(tmp_path):
    labels = torch.arange(40) % 4
    for name, margin in (("a", 1000.0), ("deep/b", 1.0)):
        rows = dataclasses.replace(empty_history({"w": 4}, 100), loss=numpy.exp(-numpy.arange(100) / 50))
        with RunWriter(tmp_path / "runs" / name, {"layers": {"w": 4}, "model": "Net"}) as writer:
            writer.append_steps(rows)
            logits = torch.nn.functional.one_hot(labels, 4).float() * margin
            elsewhere = {"held_out_logits": logits, "held_out_labels": labels.flip(0)}
            writer.append_outcome(100, diag.softmax_collapse(logits=logits, labels=labels, **elsewhere))
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "run.json").write_text("{}")
    with RunWriter(tmp_path / "outside", {"layers": {}}):
        pass
    return tmp_path / "runs"


def test_runs_are_listed_with_their_state(folder):
    rows = {row["name"]: row for row in Runs(folder).list_runs()}
    assert rows["a"]["level"] == "alarm" and rows["deep/b"]["level"] == "ok" and "problem" in rows["broken"]


def test_findings_evidence_and_comparison(folder):
    runs = Runs(folder)
    assert runs.findings("a")["findings"][0]["instrument"] == "softmax_collapse"
    assert runs.evidence("a", "softmax_collapse")["values"]["collapsed"] == [1.0]
    assert any(check["change"] == "better" for check in runs.compare(["a", "deep/b"])["checks"])


@pytest.mark.parametrize("name", ["../outside", "/etc", "a/../../outside"])
def test_no_path_outside_the_folder_is_read(folder, name):
    with pytest.raises(InvalidInput, match="lies outside"):
        Runs(folder).findings(name)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InvalidInput, match="There is no folder"):
        Runs(tmp_path / "nothing")


def test_the_server_has_four_read_only_tools(folder):
    pytest.importorskip("mcp.server.mcpserver", reason="pip install diag[mcp]")
    server = mcp_server(folder)
    tools = asyncio.run(server.list_tools())
    assert {tool.name for tool in tools} == {"list_runs", "findings", "evidence", "compare"}
    assert all(tool.description and tool.annotations.read_only_hint for tool in tools)
    answer = asyncio.run(server.call_tool("findings", {"run": "a"}))
    assert "softmax_collapse" in json.dumps(answer, default=str)
    wrong = asyncio.run(server.call_tool("findings", {"run": "../outside"}))
    assert "lies outside" in json.dumps(wrong, default=str)
