// Comforts only: without this script the page can still be read in full.
(() => {
  "use strict";
  const find = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const source = find("#diag-document");
  const doc = source ? JSON.parse(source.textContent) : {};
  const html = document.documentElement;

  // A link to something folded unfolds it.
  const reveal = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (let e = target; e; e = e.parentElement) if (e.tagName === "DETAILS") e.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  reveal();

  // Light and dark: the system's choice until the reader makes one.
  const button = find("#theme");
  if (button) {
    const store = { get: () => { try { return localStorage.getItem("diag-theme"); } catch { return null; } },
                    set: (v) => { try { localStorage.setItem("diag-theme", v); } catch { /* a file may have none */ } } };
    const system = matchMedia("(prefers-color-scheme: dark)");
    const isDark = () => (html.dataset.theme ? html.dataset.theme === "dark" : system.matches);
    const show = () => {
      button.textContent = isDark() ? "Light" : "Dark";
      button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
    };
    if (store.get()) html.dataset.theme = store.get();
    button.hidden = false;
    button.addEventListener("click", () => {
      html.dataset.theme = isDark() ? "light" : "dark";
      store.set(html.dataset.theme);
      show();
    });
    system.addEventListener("change", show);
    show();
  }

  // Printing unfolds everything, and folds it again.
  let unfolded = [];
  addEventListener("beforeprint", () => {
    unfolded = all("details:not([open])");
    unfolded.forEach((d) => { d.open = true; });
  });
  addEventListener("afterprint", () => { unfolded.forEach((d) => { d.open = false; }); unfolded = []; });

  // Tables that sort and filter.
  const value = (cell) => {
    const text = cell.textContent.trim().replace(/,/g, "").replace("−", "-").replace("∞", "Infinity");
    const number = parseFloat(text);
    return Number.isNaN(number) ? null : number;
  };
  const compare = (a, b, up) => {
    if (a === null || b === null) return (a === null) - (b === null);
    const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    return up ? order : -order;
  };
  for (const table of all("table.sortable")) {
    const body = find("tbody", table);
    const original = [...body.rows];
    all("thead th", table).forEach((head, column) => {
      const sorter = document.createElement("button");
      sorter.type = "button";
      sorter.append(...head.childNodes);
      head.append(sorter);
      head.setAttribute("aria-sort", "none");
      sorter.addEventListener("click", () => {
        const first = column === 0 ? "ascending" : "descending";
        const second = column === 0 ? "descending" : "ascending";
        const now = head.getAttribute("aria-sort");
        const next = now === "none" ? first : now === first ? second : "none";
        all("thead th", table).forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", next);
        const key = (row) => (column === 0 ? row.cells[0].textContent.trim() : value(row.cells[column]));
        const rows = next === "none" ? original : [...original].sort((a, b) => compare(key(a), key(b), next === "ascending"));
        body.append(...rows);
      });
    });
  }
  const filter = find("#layer-filter");
  if (filter) {
    const rows = [...find("#layers-table tbody").rows];
    const count = find("#layer-count");
    const apply = () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const name = row.cells[0].textContent.toLowerCase();
        row.hidden = !words.every((word) => name.includes(word));
        shown += !row.hidden;
      }
      count.textContent = words.length ? `${shown} of ${rows.length}` : "";
    };
    find(".filter").hidden = false;
    filter.addEventListener("input", apply);
  }

  // The pointer reads the curves and the map.
  const short = (v) => (v === null || v === undefined ? "not observed" : Number(v).toPrecision(3).replace(/\.?0+(e|$)/, "$1"));
  const nearest = (list, at) => list.reduce((best, x, i) => (Math.abs(x - at) < Math.abs(list[best] - at) ? i : best), 0);
  const timeline = find(".timeline");
  if (timeline && doc.timeline) {
    const { first_step: first, last_step: last, curves } = doc.timeline;
    const readout = find(".readout", timeline);
    const plots = all(".plot:not(.axis)", timeline);
    const lines = plots.map((plot) => plot.appendChild(Object.assign(document.createElement("i"), { className: "cursor", hidden: true })));
    const leave = () => { lines.forEach((l) => { l.hidden = true; }); readout.textContent = "\u00a0"; };
    find(".shared", timeline).addEventListener("pointermove", (event) => {
      const box = plots[0].getBoundingClientRect();
      const at = (event.clientX - box.left) / box.width;
      if (at < 0 || at > 1) { leave(); return; }
      const step = Math.min(last, Math.max(first, Math.round(first - 0.5 + at * (last - first + 1))));
      lines.forEach((line) => { line.hidden = false; line.style.left = `${100 * at}%`; });
      const values = curves.map((c) => `${c.label.toLowerCase()} ${short(c.middle[nearest(c.at, at)])}`);
      readout.textContent = [`step ${step.toLocaleString("en")}`, ...values].join(" · ");
    });
    find(".shared", timeline).addEventListener("pointerleave", leave);
  }
  for (const plot of all(".map")) {
    const heat = doc.layers.maps[Number(plot.dataset.map)];
    const readout = find(".readout", plot.closest("figure"));
    const broken = new Set(heat.nonfinite.map(String));
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const row = Math.min(heat.values.length - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * heat.values.length)));
      const column = Math.min(heat.starts.length - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * heat.starts.length)));
      const [a, b] = [heat.starts[column], heat.ends[column]];
      const steps = a === b ? `step ${a.toLocaleString("en")}` : `steps ${a.toLocaleString("en")}–${b.toLocaleString("en")}`;
      const what = broken.has(`${row},${column}`) ? "not finite" : short(heat.values[row][column]);
      readout.textContent = `${doc.layers.rows[row].name} · ${steps} · ${what}`;
    });
    plot.addEventListener("pointerleave", () => { readout.textContent = "\u00a0"; });
  }

  // The data, for download.
  const download = find("#download");
  if (download) {
    download.hidden = false;
    download.addEventListener("click", () => {
      const url = URL.createObjectURL(new Blob([source.textContent], { type: "application/json" }));
      const link = Object.assign(document.createElement("a"), { href: url, download: "report.json" });
      link.click();
      URL.revokeObjectURL(url);
    });
  }
})();
