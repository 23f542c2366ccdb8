// --- the text: every token, marked by how the query reads it; only lines in sight are made ---

const LINE_HEIGHT = 24;
const MISSED = 0.02; // of dense attention's mass: a block that nothing read is marked from here on
const CLIP = 24; // columns of the longest token that is shown whole; its title holds all of it

// First tokens of the lines, for so many columns: after a line end, else after a space if one is
// near, else where the line is full.
function linesOf(trace, columns) {
  const apart = trace.longest > 1 ? 1 : 0;
  const starts = [0];
  let used = 0;
  let rest = 0; // the last token after which one may break, and the columns from there on
  let after = 0;
  for (let s = 0; s < trace.length; s++) {
    const cells = trace.cells[s] + apart;
    if (used + cells > columns && used > 0) {
      const near = rest > starts.at(-1) && after < columns / 3;
      starts.push(near ? rest : s);
      used = near ? after : 0;
    }
    used += cells;
    after += cells;
    const token = trace.facts.tokens[s];
    if (/\s$/.test(token)) [rest, after] = [s + 1, 0];
    if (token.endsWith("\n") && s + 1 < trace.length) {
      starts.push(s + 1);
      used = 0;
    }
  }
  return starts;
}

const upTo = (sorted, value) => {
  // how many of some ascending numbers are at most `value`
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= value) low = middle + 1;
    else high = middle;
  }
  return low;
};

// act: what the explorer does when a token is hovered (or null), chosen, or its block looked at.
class TextPanel {
  constructor(root, trace, act) {
    Object.assign(this, { root, trace, act, starts: [0], made: new Map(), hits: [] });
    trace.cells ??= trace.tokens.map((token) => clamp(cellsOf(token), 1, CLIP));
    this.asking = new Set(trace.asked.map(({ t }) => t));
    this.inside = root.appendChild(
      element("div", "", { class: "nsa-lines", role: "presentation" }),
    );
    this.probe = root.appendChild(
      element("span", "0".repeat(20), { class: "nsa-probe", "aria-hidden": "true" }),
    );
    root.addEventListener("scroll", () => this.fill());
    const token = (event) => Number(event.target.closest?.("[data-s]")?.dataset.s ?? -1);
    root.addEventListener("pointermove", (event) => {
      const s = token(event);
      if (s === this.under) return;
      act.hover((this.under = s));
      if (s >= 0) event.target.title = tokenWords(trace, this.now, s);
    });
    root.addEventListener("pointerleave", () => act.hover((this.under = -1)));
    root.addEventListener("click", (event) => {
      const s = token(event);
      if (s >= 0) (event.shiftKey ? act.focus : act.choose)(s);
    });
  }

  resize() {
    // lines for the panel's width, if it has changed
    const width = this.root.clientWidth;
    const letter = this.probe.getBoundingClientRect().width / 20;
    if (!width || !letter || width === this.width) return;
    this.width = width;
    this.columns = Math.max(8, Math.floor((width - 20) / letter));
    this.starts = linesOf(this.trace, this.columns);
    this.inside.style.height = `${this.starts.length * LINE_HEIGHT}px`;
    this.made.clear();
    this.inside.replaceChildren();
    if (this.now) this.reveal(this.now.t);
  }

  lineOf(s) {
    return upTo(this.starts, s) - 1;
  }

  inSight() {
    // the first and last line that one sees
    const { scrollTop, clientHeight } = this.root;
    const last = Math.ceil((scrollTop + clientHeight) / LINE_HEIGHT);
    return [Math.floor(scrollTop / LINE_HEIGHT), Math.min(this.starts.length, last) - 1];
  }

  reveal(s) {
    // scroll a token's line into sight, to the middle
    const line = this.lineOf(s);
    const [first, last] = this.inSight();
    if (line > first && line < last) return;
    this.root.scrollTop = (line + 0.5) * LINE_HEIGHT - this.root.clientHeight / 2;
  }

  draw(now, view, other) {
    Object.assign(this, { now, view, other });
    this.resize();
    this.fill();
  }

  fill() {
    // make the lines in sight, forget the others, mark their tokens
    if (!this.now) return;
    const [first, last] = this.inSight();
    for (const [line, node] of this.made) {
      if (line >= first - 2 && line <= last + 2) continue;
      node.remove();
      this.made.delete(line);
    }
    const low = Math.max(0, first - 1);
    for (let line = low; line <= Math.min(this.starts.length - 1, last + 1); line++) {
      if (!this.made.has(line)) this.made.set(line, this.makeLine(line));
      for (const span of this.made.get(line).children) this.mark(span);
    }
    const here = this.inside.querySelector(`[data-s="${this.view.query}"]`);
    if (here) this.root.setAttribute("aria-activedescendant", here.id);
    else this.root.removeAttribute("aria-activedescendant");
  }

  makeLine(line) {
    const node = element("div", "", { class: "nsa-line", role: "presentation" });
    node.style.top = `${line * LINE_HEIGHT}px`;
    const end = this.starts[line + 1] ?? this.trace.length;
    for (let s = this.starts[line]; s < end; s++) node.append(this.makeToken(s));
    return this.inside.appendChild(node);
  }

  makeToken(s) {
    const { trace, root } = this;
    const span = element("span", trace.tokens[s] || "\u00A0", {
      role: "option",
      "data-s": s,
      id: `${root.id}-${s}`,
      "aria-posinset": s + 1,
      "aria-setsize": trace.length,
    });
    span.style.width = `${trace.cells[s]}ch`;
    if (trace.longest > 1) span.style.marginRight = "1ch";
    return span;
  }

  mark(span) {
    const { trace, now, view, other } = this;
    const s = Number(span.dataset.s);
    const j = trace.blockOf[s];
    const kind = trace.kindOfToken(now, s);
    const marks = [`nsa-is-${kind}`];
    if (j === view.focus) marks.push("nsa-focus");
    if (s === now.t) marks.push("nsa-now");
    if (s === now.answerAt) marks.push("nsa-answer");
    if (this.asking.has(s)) marks.push("nsa-asks");
    if (other && s <= now.t && now.kinds[j] > 1 && other.kinds[j] < 2) marks.push("nsa-only");
    if (now.missed && s < now.windowFirst && now.missed[j] >= MISSED) {
      marks.push(now.missed[j] >= 5 * MISSED ? "nsa-missed-most" : "nsa-missed");
    }
    for (const [first, end, current] of this.hits) {
      if (s >= first && s < end) marks.push(current ? "nsa-hit-now" : "nsa-hit");
    }
    const names = marks.join(" ");
    const mass = now.missed && now.missed[j] ? now.missed[j].toFixed(2) : "";
    if (span.names === names && span.mass === mass) return;
    Object.assign(span, { names, mass, className: names });
    span.setAttribute("aria-label", tokenWords(trace, now, s));
    span.setAttribute("aria-selected", s === view.query);
  }

  // The lines in sight, for a picture.
  drawOn(sheet) {
    const { trace, now, view } = this;
    const letter = 7.4;
    const starts = linesOf(trace, Math.floor(sheet.width / letter) - 1);
    const rows = Math.floor(sheet.height / LINE_HEIGHT);
    const first = clamp(
      upTo(starts, now.t) - 1 - (rows >> 1),
      0,
      Math.max(0, starts.length - rows),
    );
    for (let line = first; line < Math.min(starts.length, first + rows); line++) {
      let x = 2;
      for (let s = starts[line]; s < (starts[line + 1] ?? trace.length); s++) {
        const wide = trace.cells[s] * letter;
        this.drawToken(sheet, s, x, (line - first) * LINE_HEIGHT, wide, view);
        x += wide + (trace.longest > 1 ? letter : 0);
      }
    }
  }

  drawToken(sheet, s, x, y, wide, view) {
    const { trace, now } = this;
    const kind = trace.kindOfToken(now, s);
    if (trace.blockOf[s] === view.focus) sheet.rect(x, y, wide, 17, sheet.skin.focus);
    if (["forced", "selected", "window", "compressed"].includes(kind))
      sheet.box(kind, x, y + 17, wide, 5);
    const ink = kind === "unseen" ? sheet.skin.line : sheet.skin.ink;
    sheet.text(clipped(trace.tokens[s], trace.cells[s]), x + wide / 2, y + 9, "center", ink);
    if (s === now.t || s === now.answerAt) sheet.outline(x, y, wide, 17, sheet.skin.ink, 1.5);
  }
}

// --- search ---

// Where some words stand: [first token, end] of each place, in order; large and small are alike.
function findAll(trace, words) {
  const wanted = words.toLowerCase();
  if (!wanted.trim()) return [];
  trace.search ??= joined(trace);
  const { text, begins } = trace.search;
  const found = [];
  for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
    found.push([upTo(begins, at) - 1, upTo(begins, at + wanted.length - 1)]);
  }
  return found;
}

function joined(trace) {
  const lower = trace.facts.tokens.map((token) => token.toLowerCase() + gap(trace));
  let at = 0;
  return {
    text: lower.join(""),
    begins: lower.map((token) => (at += token.length) - token.length),
  };
}
