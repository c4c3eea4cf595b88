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

  // Printing unfolds what follows from a finding, and folds it again.
  let unfolded = [];
  addEventListener("beforeprint", () => {
    unfolded = all("details.follows:not([open])");
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

  // What shares the step axis: the pointer reads it, dragging and buttons zoom it, a finding lights its steps.
  const short = (v) => (v === null || v === undefined ? "not observed" : Number(v).toPrecision(3).replace(/\.?0+(e|$)/, "$1"));
  const nearest = (list, at) => list.reduce((best, x, i) => (Math.abs(x - at) < Math.abs(list[best] - at) ? i : best), 0);
  const make = (name, style = {}) => {
    const made = Object.assign(document.createElement("i"), { className: name });
    Object.assign(made.style, style);
    return made;
  };
  const shared = all("[data-axis]");
  const plots = shared.flatMap((s) => all(".plot", s));
  const time = doc.timeline;
  const view = { from: 0, to: 1 };
  if (time) {
    const first = time.first_step, last = time.last_step, span = last - first + 1;
    const within = (at) => (at - view.from) / (view.to - view.from);
    const place = (e) => {
      if (e.dataset.at === undefined) { e.dataset.at = parseFloat(e.style.left); e.dataset.wide = parseFloat(e.style.width) || ""; }
      const left = within(e.dataset.at / 100), wide = e.dataset.wide ? e.dataset.wide / 100 / (view.to - view.from) : 0;
      e.style.left = `${100 * left}%`;
      if (e.dataset.wide) e.style.width = `${100 * wide}%`;
      e.style.display = left + wide < -1e-9 || left > 1 + 1e-9 ? "none" : "";
    };
    const ticks = (a, b) => {
      const raw = (b - a) / 6, unit = 10 ** Math.floor(Math.log10(Math.max(raw, 1)));
      const width = Math.max(1, [1, 2, 5, 10].map((f) => f * unit).find((w) => w >= raw) || 1);
      const found = [];
      for (let step = Math.ceil(a / width) * width; step <= b; step += width) found.push(step);
      return found;
    };
    const position = (step) => (step - first + 0.5) / span;
    const zoom = (from, to) => {
      const least = Math.min(1, 4 / span), wide = Math.min(1, Math.max(least, to - from));
      view.from = Math.min(1 - wide, Math.max(0, from));
      view.to = view.from + wide;
      const all_of_it = wide > 1 - 1e-9;
      document.body.classList.toggle("zoomed", !all_of_it);
      const steps = all_of_it ? time.ticks.map((t) => first + t.at * span - 0.5) : ticks(first + view.from * span, first - 1 + view.to * span);
      for (const plot of plots) {
        all(":scope > .grid-x", plot).forEach((e) => e.remove());
        if (plot.classList.contains("axis")) {
          plot.replaceChildren(...steps.map((s) => {
            const mark = Object.assign(document.createElement("span"), { textContent: Math.round(s).toLocaleString("en") });
            const at = within(position(s));
            mark.style.left = `${100 * at}%`;
            if (at > 0.97) mark.className = "last";
            return mark;
          }));
          continue;
        }
        if (!plot.classList.contains("map")) plot.prepend(...steps.map((s) => make("grid-x", { left: `${100 * within(position(s))}%` })));
        all(":scope > [style*='left']:not(.grid-x):not(.cursor):not(.picked):not(.lit)", plot).forEach(place);
        const svg = find(":scope > svg", plot);
        if (svg) svg.setAttribute("viewBox", `${1000 * view.from} 0 ${1000 * wide} 100`);
        const img = find(":scope > img", plot);
        if (img) Object.assign(img.style, { width: `${100 / wide}%`, left: `${-100 * view.from / wide}%`, maxWidth: "none" });
      }
    };
    const controls = find(".zoom"); // where there are curves
    if (controls) controls.hidden = false;
    controls?.addEventListener("click", (event) => {
      const wide = view.to - view.from, middle = (view.from + view.to) / 2;
      const how = { in: [middle - wide / 4, middle + wide / 4], out: [middle - wide, middle + wide], back: [view.from - wide / 2, view.to - wide / 2],
                    on: [view.from + wide / 2, view.to + wide / 2], all: [0, 1] }[event.target.dataset.zoom];
      if (how) zoom(...how);
    });

    // The series that each figure reads out.
    const outcome = doc.outcome ? doc.outcome.panels.flatMap((p) => p.lines.map((l) => ({ ...l, label: `${p.label.toLowerCase()}, ${l.label}` }))) : [];
    const series = (plot) => (plot.closest(".outcome") ? outcome : time.curves);
    const cursors = plots.filter((p) => !p.classList.contains("axis")).map((p) => p.appendChild(Object.assign(make("cursor"), { hidden: true })));
    let from = null;
    const leave = () => {
      cursors.forEach((l) => { l.hidden = true; });
      all(".timeline .readout, .outcome .readout").forEach((r) => { r.textContent = "\u00a0"; });
    };
    for (const part of shared) {
      const share = (event) => {
        const box = find(".plot", part).getBoundingClientRect();
        return (event.clientX - box.left) / box.width;
      };
      part.addEventListener("pointermove", (event) => {
        const here = share(event);
        if (here < 0 || here > 1) { leave(); return; }
        const at = view.from + here * (view.to - view.from);
        const step = Math.min(last, Math.max(first, Math.round(first - 0.5 + at * span)));
        cursors.forEach((line) => { line.hidden = false; line.style.left = `${100 * here}%`; });
        const figure = part.closest("figure"), readout = figure && !figure.classList.contains("heat") && find(".readout", figure);
        if (readout) {
          const values = series(part).map((c) => `${c.label.toLowerCase()} ${short(c.middle[nearest(c.at, at)])}`);
          readout.textContent = [`step ${step.toLocaleString("en")}`, ...values].join(" · ");
        }
        if (from !== null) {
          all(".picked").forEach((e) => e.remove());
          const [a, b] = [Math.min(from, at), Math.max(from, at)].map(within);
          plots.filter((p) => !p.classList.contains("axis")).forEach((p) => p.append(make("picked", { left: `${100 * a}%`, width: `${100 * (b - a)}%` })));
        }
      });
      part.addEventListener("pointerleave", leave);
      part.addEventListener("pointerdown", (event) => {
        const here = share(event);
        if (event.button || event.pointerType === "touch" || event.target.closest("a") || here < 0 || here > 1) return;
        event.preventDefault();
        from = view.from + here * (view.to - view.from);
      });
      part.addEventListener("dblclick", () => zoom(0, 1));
      part.addEventListener("pointerup", (event) => {
        if (from === null) return;
        const to = view.from + Math.min(1, Math.max(0, share(event))) * (view.to - view.from);
        if (Math.abs(to - from) > 0.01 * (view.to - view.from)) zoom(Math.min(from, to), Math.max(from, to));
      });
    }
    addEventListener("pointerup", () => { from = null; all(".picked").forEach((e) => e.remove()); });

    const lanes = new Map(time.lanes.map((lane) => [lane.audit, lane]));
    const dark = () => { all(".plot > .lit").forEach((e) => e.remove()); all("tr.lit").forEach((r) => r.classList.remove("lit")); };
    const light = (id) => {
      dark();
      const lane = lanes.get(id);
      if (lane) {
        for (const plot of plots.filter((p) => !p.classList.contains("axis"))) {
          const a = Math.max(0, within(lane.start)), b = Math.min(1, within(lane.end));
          if (b > a) plot.append(make("lit", { left: `${100 * a}%`, width: `${100 * (b - a)}%` }));
        }
      }
      all("#layers-table .flag").filter((f) => f.hash === `#check-${id}`).forEach((f) => f.closest("tr").classList.add("lit"));
    };
    for (const part of all("[data-lights]")) {
      part.addEventListener("pointerenter", () => light(part.dataset.lights));
      part.addEventListener("pointerleave", dark);
      part.addEventListener("focusin", () => light(part.dataset.lights));
      part.addEventListener("focusout", dark);
    }
    for (const link of all(".timeline .label a")) {
      link.addEventListener("pointerenter", () => light(link.hash.replace("#check-", "")));
      link.addEventListener("pointerleave", dark);
    }
  }

  // Drawings of results say the value under the pointer: the nearest point that was drawn.
  const tip = document.body.appendChild(Object.assign(document.createElement("div"), { className: "tip", hidden: true }));
  tip.setAttribute("aria-hidden", "true");
  for (const svg of all("svg[data-plot]")) {
    const about = JSON.parse(svg.dataset.plot);
    const [left, top, right, bottom] = about.box;
    let points = null;
    const drawn = () => {
      const found = [];
      for (const e of all("[clip-path] use, use[clip-path]", svg)) found.push([+e.getAttribute("x"), +e.getAttribute("y")]);
      for (const e of all("path[clip-path], [clip-path] > path", svg)) {
        const numbers = (e.getAttribute("d") || "").match(/-?\d+(\.\d+)?/g) || [];
        if (numbers.length <= 4) continue;
        for (let i = 0; i + 1 < numbers.length; i += 2) found.push([+numbers[i], +numbers[i + 1]]);
      }
      return found.filter(([x, y]) => x >= left - 1 && x <= right + 1 && y >= top - 1 && y <= bottom + 1);
    };
    const value = (at, [low, high, scale], share) => {
      if (scale === "log") return short(10 ** (Math.log10(low) + share * (Math.log10(high) - Math.log10(low))));
      return scale === "linear" ? short(low + share * (high - low)) : null;
    };
    svg.addEventListener("pointermove", (event) => {
      points = points || drawn();
      const to = svg.getScreenCTM();
      if (!points.length || !to) return;
      const here = new DOMPoint(event.clientX, event.clientY).matrixTransform(to.inverse());
      const near = points.reduce((best, p) => (Math.hypot(p[0] - here.x, p[1] - here.y) < Math.hypot(best[0] - here.x, best[1] - here.y) ? p : best));
      const x = value(near[0], about.x, (near[0] - left) / (right - left)), y = value(near[1], about.y, (bottom - near[1]) / (bottom - top));
      if (Math.hypot(near[0] - here.x, near[1] - here.y) > 40 || x === null || y === null) { tip.hidden = true; return; }
      tip.textContent = `${about.labels[0]} ${x}\n${about.labels[1]} ${y}`;
      tip.hidden = false;
      tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 4)}px`;
      tip.style.top = `${event.clientY + 14}px`;
    });
    svg.addEventListener("pointerleave", () => { tip.hidden = true; });
  }
  for (const plot of all(".map")) {
    const heat = doc.layers.maps[Number(plot.dataset.map)];
    const readout = find(".readout", plot.closest("figure"));
    const broken = new Set(heat.nonfinite.map(String));
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const row = Math.min(heat.values.length - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * heat.values.length)));
      const share = view.from + (event.clientX - box.left) / box.width * (view.to - view.from);
      const column = Math.min(heat.starts.length - 1, Math.max(0, Math.floor(share * heat.starts.length)));
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
      // In the text, as numbers that are read and written again may lose digits.
      const whole = source.textContent.replace(/"documentation":"(#check-[^"]*)"/g, (all, card) => {
        const text = find(`${card} .doc`);
        return text ? `"documentation":${JSON.stringify(text.textContent)}` : all;
      });
      const url = URL.createObjectURL(new Blob([whole], { type: "application/json" }));
      const link = Object.assign(document.createElement("a"), { href: url, download: "report.json" });
      link.click();
      URL.revokeObjectURL(url);
    });
  }
})();
