// --- start: in a notebook, and on a page of its own ---

async function render({ model, el }) {
  const trace = await openTrace(model.get("facts"), model.get("data"));
  const root = el.appendChild(document.createElement("div"));
  root.explorer = new Explorer(root, trace, model);
  return () => root.explorer.close();
}

// Stands in for the notebook's model on a page of its own.
function pageModel(values) {
  const news = new EventTarget();
  return {
    get: (name) => values[name],
    set(name, value) {
      values[name] = value;
      news.dispatchEvent(new Event(`change:${name}`));
    },
    on: (event, listener) => news.addEventListener(event, listener),
    off: (event, listener) => news.removeEventListener(event, listener),
    save_changes() {},
  };
}

async function openPage() {
  const read = (id) => document.getElementById(id).textContent;
  const data = Uint8Array.from(atob(read("data")), (letter) => letter.charCodeAt(0));
  const model = pageModel({ facts: JSON.parse(read("facts")), data, ...JSON.parse(read("state")) });
  const el = document.getElementById("explorer");
  await render({ model, el });
  el.firstChild.address = new Address(el.firstChild.explorer);
}

export default { render };
