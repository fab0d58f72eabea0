// Small things to build the page of. Text is only ever text: nothing here reads HTML.

export const $ = (id) => document.getElementById(id);

export function make(tag, ...children) {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
}

export function span(text, name = "") {
  const node = make("span", text);
  node.className = name;
  return node;
}

export function button(text, title, action) {
  const node = make("button", text);
  node.type = "button";
  node.title = title;
  node.addEventListener("click", action);
  return node;
}

// a field as high as its text
export function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

// the browser's clipboard is there on this machine and over TLS alone; elsewhere what is selected can be copied
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { /* not allowed, or not there */ }
  const box = make("textarea", text);
  box.className = "unseen";
  const focused = document.activeElement;
  document.body.append(box);
  box.select();
  const isDone = document.execCommand("copy");
  box.remove();
  focused?.focus();
  return isDone;
}

// a button that copies what `text` gives, and says whether it did
export function copyBy(name, title, text) {
  const node = button(name, title, async () => {
    node.textContent = (await copied(text())) ? "Copied" : "Not allowed";
    setTimeout(() => { node.textContent = name; }, 1500);
  });
  node.className = "copy";
  return node;
}

// what has not changed stays, with what is selected and scrolled in it
export function update(box, fragment) {
  const old = [...box.childNodes];
  const fresh = [...fragment.childNodes];
  let same = 0;
  while (same < old.length && same < fresh.length && old[same].isEqualNode(fresh[same])) same++;
  old.slice(same).forEach((node) => node.remove());
  box.append(...fresh.slice(same));
}

export function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// 16 random letters; crypto.randomUUID is not there on plain HTTP from another machine
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
