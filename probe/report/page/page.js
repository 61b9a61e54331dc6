"use strict";
(() => {
  const find = (root, what) => Array.from(root.querySelectorAll(what));
  const text = (element) => element.textContent.trim();
  const said = {};
  for (const key of find(document, ".legend li")) {
    const span = key.querySelector("span");
    said[span.className.replace("key ", "")] = key.textContent.slice(span.textContent.length).trim();
  }
  for (const table of find(document, "table.heat")) {
    const id = table.dataset.id;
    const data = JSON.parse(document.getElementById(id + "-data").textContent);
    const panel = document.getElementById(id + "-panel");
    const body = table.tBodies[0];
    const section = table.closest("section");

    // --- rows: those in the table, and those that wait as text for who has no script
    const plain = (html) => html.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&#34;|&quot;/g, '"').replace(/&#39;/g, "'").replace(/&amp;/g, "&");
    const entries = Array.from(body.rows).map((row) => ({ row, name: (row.cells[0].title || text(row.cells[0])).toLowerCase(), wrong: row.classList.contains("w") }));
    const waiting = section.querySelector("noscript.rest");
    const total = Number(table.dataset.rows);
    const wake = () => {
      if (entries.length === total) return;
      for (const line of waiting.textContent.split("\n")) {
        const head = /^<tr( class=w)?(?: data-p=\d+)?><th scope=row(?: title="([^"]*)")?>([^<]*)/.exec(line);
        if (head) entries.push({ line, name: plain(head[2] || head[3]).toLowerCase(), wrong: Boolean(head[1]) });
      }
    };
    const made = document.createElement("template");
    const rowOf = (entry) => {
      if (!entry.row) {
        made.innerHTML = "<table><tbody>" + entry.line;
        entry.row = made.content.querySelector("tr");
        find(entry.row, "td a").forEach((link) => { link.tabIndex = -1; });
        entry.line = "";
      }
      return entry.row;
    };
    const STEP = 200;
    let matching = entries;
    let limit = waiting ? body.rows.length : Infinity;
    const more = section.querySelector("button.more");
    const draw = () => {
      if (waiting || body.rows.length !== matching.length) body.replaceChildren(...matching.slice(0, limit).map(rowOf));
      const left = (matching === entries ? total : matching.length) - limit;
      more.hidden = left <= 0;
      more.textContent = "Show " + Math.min(STEP, left) + " more rows";
      if (!body.contains(current)) settle(body.rows.length ? body.rows[0].cells[1] : null);
    };
    more.addEventListener("click", () => { wake(); limit += STEP; draw(); });

    // --- filter
    const controls = section.querySelector(".controls");
    const [search, only, count] = ["input[type=search]", "input[type=checkbox]", "output"].map((what) => controls.querySelector(what));
    const tellCount = () => { count.textContent = (matching.length === entries.length ? "" : matching.length + " of ") + total + (total === 1 ? " row" : " rows"); };
    const filter = () => {
      wake();
      const words = search.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
      matching = entries.filter((entry) => (!only.checked || entry.wrong) && words.every((word) => entry.name.includes(word)));
      limit = waiting ? STEP : Infinity;
      draw();
      tellCount();
    };
    search.addEventListener("input", filter);
    only.addEventListener("change", filter);
    controls.hidden = total < 2;

    // --- what a cell says
    const tell = (cell) => {
      let at = 0;
      for (let before = cell.previousElementSibling; before && before.tagName === "TD"; before = before.previousElementSibling) at += before.colSpan;
      const width = data.columns.length;
      const bits = data.columns.slice(at % width, at % width + cell.colSpan).map((column) => column[0] + " " + column[1]);
      const state = (cell.className[0] || "f").toLowerCase();
      const judge = data.judge + (data.source ? " (" + data.source + ")" : "");
      const wrong = !data.judge ? " This tool does not know the model that it is judged by." :
        cell.className.endsWith("x") ? " Otherwise than " + judge + " says." : " As " + judge + " says, or it does not say.";
      panel.textContent = text(cell.parentElement.cells[0]) + ": " + data.questions[Math.floor(at / width)] + ", " +
        (bits.length > 1 ? "bits " : "bit ") + bits.join(", ") + ": " + said[state] + "." +
        (state === "n" ? "" : wrong) + " " + reason(id, cell.parentElement.dataset.p || "0", data.columns.slice(at % width, at % width + cell.colSpan));
      panel.hidden = false;
    };
    const reason = (section, prediction, columns) => {
      if (columns.length !== 1) return "";
      const numbers = columns[0][1].startsWith("reserved") ? columns[0][1].slice(9) : columns[0][0];
      const first = Number(numbers.split(/[-,]/)[0]);
      for (const row of find(document, "#" + section + "-bits .reasons tbody tr")) {
        if (row.dataset.p !== prediction) continue;
        const parts = row.cells[0].textContent.replace(/\(.*/, "").trim().split(",").map((part) => part.split("-").map(Number));
        if (parts.some(([low, high]) => first >= low && first <= (high === undefined ? low : high)))
          return "Predicted: " + text(row.cells[1]) + ", because " + text(row.cells[2]) + " (" + text(row.cells[3]) + ").";
      }
      for (const row of find(document, "#" + section + "-bits .names tbody tr"))
        if (Number(row.cells[0].textContent) === first && !columns[0][1].startsWith("reserved"))
          return "Set to 1: " + text(row.cells[2]) + " (" + text(row.cells[3]) + ").";
      return "Reserved.";
    };
    const cellOf = (target) => target.closest && target.closest(".heat tbody td");
    table.addEventListener("pointerover", (event) => { const cell = cellOf(event.target); if (cell) tell(cell); });
    table.addEventListener("focusin", (event) => { const cell = cellOf(event.target); if (cell) tell(cell); });

    // --- keyboard: one cell takes part in Tab, arrows move it
    const holder = (cell) => cell.querySelector("a") || cell;
    let current = null;
    const settle = (cell) => {
      if (current) holder(current).tabIndex = -1;
      current = cell;
      if (cell) holder(cell).tabIndex = 0;
    };
    find(table, "tbody a").forEach((link) => { link.tabIndex = -1; });
    addEventListener("beforeprint", () => {
      wake();
      limit = Infinity;
      draw();
      find(document, "details").forEach((one) => { one.open = true; });
    });
    if (waiting) more.hidden = false;
    more.textContent = "Show " + Math.min(STEP, total - body.rows.length) + " more rows";
    settle(body.rows.length ? body.rows[0].cells[1] : null);
    table.addEventListener("keydown", (event) => {
      const cell = cellOf(event.target);
      if (!cell) return;
      const row = cell.parentElement;
      const at = row.sectionRowIndex;
      const across = cell.cellIndex;
      const to = { ArrowRight: [at, across + 1], ArrowLeft: [at, across - 1], ArrowDown: [at + 1, across], ArrowUp: [at - 1, across], Home: [at, 1], End: [at, row.cells.length - 1] }[event.key];
      const there = to && body.rows[to[0]];
      if (!there || to[1] < 1) return;
      event.preventDefault();
      settle(there.cells[Math.min(to[1], there.cells.length - 1)]);
      holder(current).focus();
    });
    table.addEventListener("click", (event) => {
      const cell = cellOf(event.target);
      if (!cell) return;
      event.preventDefault();
      settle(cell);
      holder(cell).focus();
      tell(cell);
    });
  }
  for (const one of find(document, "details.bits")) if (location.hash === "#" + one.id) one.open = true;
})();
