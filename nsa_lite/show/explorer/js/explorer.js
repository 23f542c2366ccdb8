// --- the explorer: panes, controls and keys around one view ---

const LAYOUT = `
  <div class="nsa-controls"></div>
  <div class="nsa-tools"></div>
  <div class="nsa-help" hidden></div>
  <div class="nsa-legend"></div>
  <p class="nsa-difference" hidden></p>
  <p class="nsa-spoken" role="status" aria-live="polite"></p>
  <div class="nsa-panes"></div>
  <p class="nsa-reader"></p>
  <p class="nsa-about"></p>`;

class Explorer {
  constructor(root, trace, model) {
    root.className = "nsa-explorer";
    root.innerHTML = LAYOUT;
    Object.assign(this, { root, trace, model, panes: [], drawn() {} });
    for (const name of ["controls", "legend", "difference", "spoken", "reader", "about"]) {
      this[name] = root.querySelector(`.nsa-${name}`);
    }
    this.about.textContent = trace.facts.about ?? "";
    this.view = {
      hovered: null,
      zoom: 0,
      area: null,
      brush: null,
      focus: trace.own(model.get("query")),
      query: model.get("query"),
      beside: null,
    };
    this.makePanes(1);
    this.makeControls(this.controls);
    this.tools = new Tools(root, this);
    for (const part of root.querySelectorAll("input, button, select")) {
      part.setAttribute("data-lm-suppress-shortcuts", "true");
    }
    this.listen();
    this.dress();
    this.follow();
  }

  get map() {
    return this.panes[0].map;
  }
  get strip() {
    return this.panes[0].strip;
  }
  get gates() {
    return this.panes[0].gates;
  }

  makePanes(count) {
    const parent = this.root.querySelector(".nsa-panes");
    while (this.panes.length > count) this.panes.pop().root.remove();
    while (this.panes.length < count) this.panes.push(new Pane(parent, this));
    this.root.dataset.panes = count;
    const second = this.panes[1];
    this.besideControls = {};
    if (!second) return;
    for (const name of ["checkpoint", "layer", "group"]) {
      if (name === "checkpoint" && this.trace.facts.checkpoints.length === 1) continue;
      const changed = (value) => this.set("beside", { ...this.view.beside, [name]: value });
      this.besideControls[name] = slider(
        second.title,
        name,
        this.trace.facts.ranges[name],
        changed,
        `beside: ${name}`,
      );
    }
  }

  makeControls(parent) {
    const { ranges, checkpoints } = this.trace.facts;
    this.player = new Player(parent, this.trace, this);
    this.sliders = {};
    for (const name of CHOICES) {
      if (name === "checkpoint" && checkpoints.length === 1) continue;
      this.sliders[name] = slider(parent, name, ranges[name], (value) => this.choose(name, value));
    }
    const digits = String(ranges.query[1]).length; // room for "111 (preview 40)"
    this.sliders.query.words.style.minWidth = `${2 * digits + 10}ch`;
    this.sliders.zoom = slider(parent, "zoom", [0, 100], (zoom) => this.look({ zoom }));
    if (!this.sliders.checkpoint || !this.trace.asked.length) return;
    this.curve = element("canvas", "", { class: "nsa-curve", role: "img" });
    this.sliders.checkpoint.whole.append(this.curve);
  }

  // --- what is looked at ---

  set(name, value) {
    // a choice that Python sees
    this.model.set(name, value);
    this.model.save_changes();
  }

  choose(name, value) {
    this.view.hovered = null;
    const inside = clamp(value, ...this.trace.facts.ranges[name]);
    this.set(name, name === "query" ? this.trace.snap(inside) : inside);
  }

  look(change) {
    // a choice that only this page knows
    const view = Object.assign(this.view, change);
    view.focus = clamp(view.focus, 0, this.trace.facts.blocks - 1);
    view.zoom = clamp(view.zoom, 0, 100);
    this.redraw();
  }

  lookAt(block, token) {
    // and bring its tokens into sight
    this.look({ focus: block });
    this.toReveal = token ?? this.view.focus * this.trace.size;
  }

  preview(s) {
    this.look({ hovered: this.trace.isQuery(s) ? s : null });
  }

  follow() {
    // what was chosen, here or in Python; speak once it rests
    const { view, trace, model } = this;
    const before = view.query;
    const onOwn = view.focus === trace.own(before);
    for (const name of [...CHOICES, "beside"]) view[name] = model.get(name) ?? null;
    if (onOwn) view.focus = trace.own(view.query);
    if (view.query !== before || !this.panes[0].panel.now) this.toReveal = view.query;
    const count = view.beside ? 2 : 1;
    if (count !== this.panes.length) {
      this.makePanes(count);
      this.tools.showHits();
      this.dress();
    }
    clearTimeout(this.speaking);
    this.speaking = setTimeout(() => {
      this.spoken.textContent = trace.describe(this.placeOf(0), view.query);
    }, 250);
    this.redraw();
  }

  placeOf(pane) {
    const { checkpoint, layer, group, n, beside } = this.view;
    return pane ? { ...beside, n } : { checkpoint, layer, group, n };
  }

  // --- keys and the page ---

  listen() {
    this.followed = () => this.follow();
    for (const name of [...CHOICES, "beside"]) this.model.on(`change:${name}`, this.followed);
    this.resized = new ResizeObserver(() => {
      if (this.width !== this.root.clientWidth) for (const pane of this.panes) pane.forgetRoom();
      this.width = this.root.clientWidth;
      this.redraw();
    });
    this.resized.observe(this.root);
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.redressed = () => this.dress();
    this.dark.addEventListener("change", this.redressed);
    this.themed = new MutationObserver(this.redressed);
    this.themed.observe(document.body, {
      attributes: true,
      attributeFilter: ["data-jp-theme-light"],
    });
    this.root.addEventListener("keydown", (event) => {
      if (/^(INPUT|SELECT)$/.test(event.target.tagName)) return;
      this.key(event, { "?": () => this.tools.showHelp(), "/": () => this.tools.box.focus() });
    });
  }

  dress() {
    // in light or dark
    this.skin = skinNow();
    this.root.dataset.theme = this.skin === DARK ? "dark" : "light";
    const { asked, facts } = this.trace;
    const shown = {
      two: this.panes.length > 1,
      missed: "beyond" in facts.arrays,
      asks: asked.length > 0,
    };
    legend(this.legend, this.skin, shown);
    this.redraw();
  }

  key(event, actions) {
    if (event.ctrlKey || event.altKey || event.metaKey || !(event.key in actions)) return;
    actions[event.key]();
    event.preventDefault();
    event.stopPropagation();
  }

  // --- drawing ---

  redraw() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = undefined;
      if (this.map.clientWidth) this.draw();
    });
  }

  draw() {
    const { trace, view, sliders } = this;
    const t = view.hovered ?? view.query;
    const two = this.panes.length > 1;
    const painted = this.panes.map((pane, k) =>
      pane.paint(this.placeOf(k), view, t, two ? this.placeOf(1 - k) : null),
    );
    if (this.curve) drawCurve(this.curve, trace, this.placeOf(0), this.skin);
    painted.forEach((each, k) => this.panes[k].write(each));
    if (this.toReveal !== undefined)
      for (const { panel } of this.panes) panel.reveal(this.toReveal);
    this.toReveal = undefined;
    this.reader.replaceChildren(...this.readerParts());
    for (const name in sliders) sliders[name].show(view[name]);
    sliders.query.show(view.query, t === view.query ? view.query : `${view.query} (preview ${t})`);
    sliders.checkpoint?.show(view.checkpoint, checkpointWords(trace, this.placeOf(0)));
    sliders.n.input.disabled = !trace.byScore(this.placeOf(0));
    sliders.zoom.show(view.zoom, `${view.zoom} %`);
    this.tools.twice.textContent = two ? "One pane" : "Two panes";
    this.difference.hidden = !two;
    if (two) this.drawDifference(painted.map(({ now }) => now));
    this.drawn();
  }

  drawDifference(nows) {
    this.difference.textContent = difference(...nows);
    for (const [name, control] of Object.entries(this.besideControls))
      control.show(this.view.beside[name]);
    const { checkpoint } = this.besideControls;
    checkpoint?.show(this.view.beside.checkpoint, checkpointWords(this.trace, this.placeOf(1)));
  }

  readerParts() {
    // the tokens of the block in focus, each by itself
    const { trace, view } = this;
    const head = blockWords(trace, view.focus).split(": ", 1)[0];
    const tokens = blockTokens(trace, view.focus);
    return [
      `${head}: `,
      ...tokens.flatMap((token, k) => [k ? gap(trace) : "", element("bdi", token)]),
    ];
  }

  close() {
    this.player.set(false);
    clearTimeout(this.speaking);
    this.resized.disconnect();
    this.themed.disconnect();
    this.dark.removeEventListener("change", this.redressed);
    for (const name of [...CHOICES, "beside"]) this.model.off(`change:${name}`, this.followed);
  }
}
