"use strict";
(() => {
  const find = (root, what) => Array.from(root.querySelectorAll(what));
  const text = (element) => element.textContent.trim();
  const said = {};
  const states = {};
  for (const key of find(document, ".legend li")) {
    const span = key.querySelector("span");
    if (!span) continue;
    const state = span.className.replace("key ", "");
    said[state] = key.textContent.slice(span.textContent.length).trim();
    states[text(span)] = state;
  }
  const plain = (html) => html.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&#34;|&quot;/g, '"').replace(/&#39;/g, "'").replace(/&amp;/g, "&");
  const shownName = (head) => text(head.firstChild).replace(/ !$/, "") + (head.children.length ? " " + text(head.querySelector("summary")) : "");
  for (const table of find(document, "table.heat")) {
    const id = table.dataset.id;
    const data = JSON.parse(document.getElementById(id + "-data").textContent);
    const panel = document.getElementById(id + "-panel");
    const body = table.tBodies[0];
    const section = table.closest("section");

    // --- rows: those in the table, and those that wait as letters for who has no script
    const nameOf = (html) => plain(html.replace(/<summary>.*?<\/summary>/, ", ").replace(/<[^>]*>/g, "")).toLowerCase();
    const entries = Array.from(body.rows).map((row) => ({ row, name: nameOf(row.cells[0].innerHTML), wrong: row.classList.contains("w") }));
    const waiting = section.querySelector("noscript.rest");
    const total = Number(table.dataset.rows);
    const wake = () => {
      if (entries.length === total) return;
      for (const line of waiting.textContent.split("\n")) {
        const head = /^<tr( class=w)?(?: data-p=\d+)?><th scope=row>(.*?)<td>/.exec(line);
        if (head) entries.push({ line, name: nameOf(head[2]), wrong: Boolean(head[1]) });
      }
    };
    const cellsOf = (_, marked) => {
      const letters = marked.replace(/<[^>]*>/g, "");
      let cells = "";
      for (let at = 0; at < letters.length; at += 2) {
        const state = states[letters[at]];
        const mark = letters[at + 1];
        const name = (at ? state : state.toUpperCase()) + (mark === "!" ? "x" : mark === "~" ? "u" : "");
        cells += "<td" + (name === "f" ? "" : " class=" + name) + ">" + letters[at] + mark.trim();
      }
      return cells;
    };
    const made = document.createElement("template");
    const rowOf = (entry) => {
      if (!entry.row) {
        made.innerHTML = "<table><tbody>" + entry.line.replace(/<td>(.*?)(?=<td>|$)/g, cellsOf);
        entry.row = made.content.querySelector("tr");
        entry.line = "";
      }
      return entry.row;
    };

    // --- names beyond the first few: unfolded while the filter finds something among them
    const reveal = (entry, words) => {
      const fold = entry.row.cells[0].querySelector("details");
      if (!fold) return;
      const shown = entry.row.cells[0].firstChild.textContent.toLowerCase();
      const hidden = words.some((word) => !shown.includes(word));
      if (hidden) {
        if (!entry.names) entry.names = fold.lastChild.textContent.split(", ");
        const hit = (name) => words.every((word) => name.toLowerCase().includes(word));
        const first = document.createElement("b");
        first.textContent = entry.names.filter(hit).join(", ");
        const others = entry.names.filter((name) => !hit(name)).join(", ");
        fold.replaceChildren(fold.firstElementChild, first, (first.textContent && others ? ", " : "") + others);
      } else if (entry.names) fold.replaceChildren(fold.firstElementChild, entry.names.join(", "));
      if (hidden || entry.names) fold.open = hidden;
      if (!hidden) entry.names = null;
    };
    const STEP = 100;
    let matching = entries;
    let words = [];
    let limit = waiting ? body.rows.length : Infinity;
    const more = section.querySelector("button.more");
    const draw = () => {
      if (waiting || body.rows.length !== matching.length) body.replaceChildren(...matching.slice(0, limit).map(rowOf));
      for (const row of matching) if (row.row) reveal(row, words);
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
      words = search.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
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
      const width = data.columns.length;
      const at = (cell.cellIndex - 1) % width;
      const [number, name] = data.columns[at];
      const reserved = name.startsWith("reserved ");
      const bits = reserved ? "reserved bit" + (/[-,]/.test(name) ? "s " : " ") + name.slice(9) : "bit " + number + " " + name;
      const state = (cell.className[0] || "f").toLowerCase();
      panel.textContent = shownName(cell.parentElement.cells[0]) + ": " + data.questions[Math.floor((cell.cellIndex - 1) / width)] + ", " +
        bits + ": " + said[state] + "." + (state === "n" ? "" : " " + judged(cell, state)) + " " + because(cell, reserved ? name.slice(9) : number, reserved);
      panel.hidden = false;
    };
    const judged = (cell, state) => {
      if (!data.judge) return "This tool does not know the model that it is judged by.";
      if (cell.className.endsWith("x")) return "Otherwise than " + data.judge + " says.";
      if (cell.className.endsWith("u")) return data.judge + " leaves this open.";
      return state === "m" || !data.open ? "Nothing here is otherwise than " + data.judge + " says." : "As " + data.judge + " says.";
    };
    const because = (cell, numbers, reserved) => {
      const first = Number(numbers.split(/[-,]/)[0]);
      const prediction = cell.parentElement.dataset.p || "0";
      for (const row of find(document, "#" + id + "-bits .reasons tbody tr")) {
        if (row.dataset.p !== prediction) continue;
        const parts = row.cells[0].textContent.replace(/\(.*/, "").trim().split(",").map((part) => part.split("-").map(Number));
        if (!parts.some(([low, high]) => first >= low && first <= (high === undefined ? low : high))) continue;
        const effect = text(row.cells[1].firstChild);
        return "Predicted: " + (effect === "either" ? "either, it may be accepted or take #GP" : effect) + ", because " + text(row.cells[2]) + " (" + text(row.cells[3]) + ").";
      }
      const told = [];
      if (data.rule) told.push("Its rule: " + data.rule + "; a reason for each bit is not given.");
      const meant = reserved ? null : find(document, "#" + id + "-bits .names tbody tr").find((row) => Number(row.cells[0].textContent) === first);
      if (meant) told.push("Set to 1, the bit " + text(meant.cells[2]) + " (" + text(meant.cells[3]) + ").");
      if (data.source) told.push("Source of " + data.judge + ": " + data.source + ".");
      return told.join(" ");
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
    addEventListener("beforeprint", () => { wake(); limit = Infinity; draw(); });
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
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = find(document, "details:not([open])");
    folded.forEach((one) => { one.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((one) => { one.open = false; }));
  for (const one of find(document, "details.bits")) if (location.hash === "#" + one.id) one.open = true;
})();
