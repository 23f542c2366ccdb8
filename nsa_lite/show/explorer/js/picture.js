// --- pictures: what is shown, as PNG or SVG; made here, sent nowhere ---

const PICTURE = { width: 1040, map: 400, text: 360, gap: 16 };

function pictureHeight(explorer) {
  const { root, panes: shown } = explorer;
  return root ? shown.length * (PICTURE.text + ROWS.height + 110) + 40 : 0;
}

function drawPicture(sheet, explorer) {
  const { trace, view, panes: shown } = explorer;
  const { width, map, text, gap: space } = PICTURE;
  const inner = width - 2 * space;
  shown.forEach((pane, k) => {
    const place = explorer.placeOf(k);
    const now = trace.at(place, view.query);
    const other = shown[1] ? trace.at(explorer.placeOf(1 - k), view.query) : null;
    let y = k * (text + ROWS.height + 110) + 14;
    for (const words of wrapped([placeWords(trace, place), sentence(trace, place, now)], inner)) {
      sheet.text(words, space, y);
      y += 17;
    }
    sheet.part(space, y, inner - map - space, text, (part) => pane.panel.drawOn(part));
    const plain = { ...view, t: view.query, brush: null };
    sheet.part(space + inner - map, y, map, text, (part) => drawMap(part, trace, place, plain, {}));
    const below = y + text + 8;
    sheet.part(space, below, inner - map - space, ROWS.height, (part) =>
      drawStrip(part, trace, now, other, view),
    );
    sheet.part(space + inner - map, below, map, 72, (part) => drawGates(part, trace, now));
    const lines = wrapped([blockFacts(trace, now, view.focus), ...remarks(trace, place, now)], map);
    lines
      .slice(0, 9)
      .forEach((words, at) => sheet.text(words, space + inner - map, below + 88 + 16 * at));
  });
  drawKey(sheet, sheet.height - 16);
}

function drawKey(sheet, y) {
  // the legend, in one line
  let x = PICTURE.gap;
  for (const [kind, name] of Object.entries({ ...READ, unused: "not selected" })) {
    if (!(kind in sheet.skin)) continue;
    sheet.box(kind, x, y - 7, 20, 13);
    sheet.text(name, x + 25, y);
    x += 40 + widthOf(name);
  }
}

function wrapped(texts, room) {
  // lines that fit
  return texts.flatMap((words) => {
    const lines = [""];
    for (const word of words.split(" ")) {
      const longer = lines.at(-1) ? `${lines.at(-1)} ${word}` : word;
      if (widthOf(longer) <= room) lines[lines.length - 1] = longer;
      else lines.push(word);
    }
    return lines;
  });
}

function svgOf(explorer) {
  const sheet = new SvgSheet(explorer.skin, PICTURE.width, pictureHeight(explorer));
  drawPicture(sheet, explorer);
  const page = new DOMParser().parseFromString(sheet.toString(), "text/html");
  const words = new XMLSerializer().serializeToString(page.querySelector("svg")); // with its namespace
  return new Blob([words], { type: "image/svg+xml" });
}

function pngOf(explorer) {
  const canvas = document.createElement("canvas");
  const size = [PICTURE.width, pictureHeight(explorer)];
  drawPicture(CanvasSheet.sized(canvas, explorer.skin, ...size, 2), explorer);
  return new Promise((done) => {
    canvas.toBlob(done, "image/png");
  });
}

function save(blob, name) {
  const link = element("a", "", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
