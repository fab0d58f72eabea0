// The conversations at the side: open, rename, delete and take back, out to a file and in from one.

import { chat, go } from "/chat.js";
import { restored, without, withTitle } from "/conversations.js";
import { $, button, make, newId, notice, span } from "/dom.js";
import { download, readFile } from "/transfer.js";

let deleted = null; // the last one, to be taken back
let renaming = false;

export async function paintList() {
  if (renaming || !chat.store) return;
  const heads = await chat.store.list();
  if (renaming) return;
  const focused = $("chats").contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  $("chats").replaceChildren(...heads.map(entry));
  if (focused) $("chats").querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
  $("no-chats").hidden = heads.length > 0;
  $("export").disabled = !heads.length;
}

function entry(head) {
  const title = head.title || "Untitled";
  const link = make("a", title);
  link.href = `#${head.id}`;
  link.title = `${title}\n${new Date(head.changed).toLocaleString()}`;
  const item = make("li", link);
  if (chat.answers.has(head.id)) link.append(span(" …", "running"));
  if (head.id === chat.here.id) {
    link.setAttribute("aria-current", "page");
    const rename = button("Rename", "Rename this conversation", () => renameIn(item, head));
    item.append(rename, button("Delete", "Delete this conversation", () => remove(head)));
  }
  return item;
}

function renameIn(item, head) {
  renaming = true;
  const field = make("input");
  field.value = head.title;
  field.maxLength = 200;
  field.setAttribute("aria-label", "Title");
  let ended = false;
  const end = async (isMeant) => {
    if (ended) return;
    ended = true;
    renaming = false;
    const title = field.value.trim();
    if (isMeant && title && title !== head.title) {
      if (chat.here.id === head.id) chat.here.title = title;
      await chat.store.change(head.id, withTitle(title));
    }
    await paintList();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === "Escape") {
      event.stopPropagation();
      end(event.key === "Enter");
    }
  });
  field.addEventListener("blur", () => end(true));
  item.replaceChildren(field);
  field.select();
}

async function remove(head) {
  chat.answers.get(head.id)?.controller.abort();
  deleted = await chat.store.read(head.id);
  await chat.store.change(head.id, without);
  $("deleted-title").textContent = `Deleted: ${head.title || "Untitled"}`;
  $("deleted").hidden = false;
  if (chat.here.id === head.id) openNew();
  $("undo").focus();
}

async function undo() {
  $("deleted").hidden = true;
  if (!deleted) return;
  const { id } = deleted;
  await chat.store.change(id, restored(deleted));
  deleted = null;
  location.hash = id;
}

export function openNew() {
  history.pushState(null, "", location.pathname);
  return go("");
}

async function exportAll() {
  const heads = await chat.store.list();
  download((await Promise.all(heads.map((head) => chat.store.read(head.id)))).filter(Boolean));
}

const isSame = (one, other) => JSON.stringify(one.turns.map(({ role, content }) => [role, content])) === JSON.stringify(other.turns.map(({ role, content }) => [role, content]));

async function importFile(file) {
  let found;
  try {
    found = readFile(await file.text());
  } catch (error) {
    notice(error.message);
    return;
  }
  let taken = 0;
  for (const conversation of found) {
    const there = await chat.store.read(conversation.id);
    if (there && isSame(there, conversation)) continue;
    if (there) conversation.id = newId(); // what is here stays, both are kept
    await chat.store.change(conversation.id, restored(conversation));
    taken++;
  }
  notice(`Imported ${taken} of ${found.length}${taken < found.length ? ": the others are here already" : ""}.`);
}

$("undo").addEventListener("click", undo);
$("export").addEventListener("click", exportAll);
$("import").addEventListener("click", () => $("import-file").click());
$("import-file").addEventListener("change", async ({ target }) => {
  if (target.files[0]) await importFile(target.files[0]);
  target.value = "";
});
