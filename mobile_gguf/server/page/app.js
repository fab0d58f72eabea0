import { access, ask } from "/api.js";
import { begin, chat, go, isBusy, paint, regenerate, send, setSettings, stop } from "/chat.js";
import { $, fit, notice } from "/dom.js";
import { openNew, paintList } from "/list.js";
import { unwatch, watch } from "/map.js";
import { bytes } from "/receipt.js";
import { following } from "/scroll.js";
import { fill, isSet, read, showDefaults } from "/settings.js";

// the server

const RETRY_MS = 3000;
let retry = 0;

function askForKey() {
  $("key-row").hidden = false;
  $("key").focus();
}

async function connect() {
  clearTimeout(retry);
  try {
    chat.card = (await (await ask("/v1/models")).json()).data[0];
  } catch (error) {
    notice(error.lost ? "No connection to the server: trying again." : error.message);
    if (error.status === 401) askForKey();
    else retry = setTimeout(connect, RETRY_MS);
    return;
  }
  const { id, meta } = chat.card;
  notice(meta.chats ? "" : "This model makes embeddings and does not chat: see /v1/embeddings.");
  $("send").disabled = !meta.chats;
  $("model").textContent = meta.name || id;
  $("model").title = `${id}: ${meta.architecture}, ${meta.quantization}, context ${meta.n_ctx}`;
  $("mode").replaceChildren(...meta.modes.map((mode) => new Option(mode, mode)));
  $("mode").parentElement.hidden = false;
  $("mode").disabled = meta.modes.length < 2;
  showDefaults(meta);
  following(paint); // a conversation that came before the model has its buttons now
  showState();
  introduce(meta);
  watchMap();
}

// for who sees such a model for the first time
function introduce(meta) {
  const { n_expert: n, n_expert_used: k, n_layer_moe: layers, ram_budget_bytes: budget, expert_bytes: all } = meta;
  const inMemory = budget === null ? "" : budget < all ? ` At most ${bytes(budget)} of them are in memory at once; the rest is read when a token needs it.` : " All of them may stay in memory.";
  $("facts").textContent = n ? `${bytes(meta.file_bytes)}, of which ${bytes(all)} are experts: ${n} in each of ${layers} layers, and a token uses ${k} of them.${inMemory}` : "";
  $("modes").textContent = meta.modes.length > 1 ? `Mode exact uses all ${k}, little ${meta.little_k}, big-little ${meta.little_k} and then all ${k} where the model is unsure, auto all but missing ones that it may do without.` : "";
}

// only pages that are looked at show the map
async function watchMap() {
  if ($("side").hidden || document.hidden || !chat.card) unwatch();
  else if (await watch(chat.card.meta)) {
    clearTimeout(retry);
    retry = setTimeout(connect, RETRY_MS);
  }
}

function setOpen(panel, opener, isOpen) {
  $(panel).hidden = !isOpen;
  $(opener).setAttribute("aria-expanded", isOpen);
}

function toggleMap() {
  setOpen("side", "show-map", $("side").hidden);
  watchMap();
}

const toggleList = () => setOpen("list", "show-list", $("list").hidden);
const narrow = matchMedia("(max-width: 760px)");
const isNarrow = () => narrow.matches;

// what lies over or above the conversation is shut where there is no room beside it
function shutPanels() {
  if (!isNarrow()) return;
  setOpen("list", "show-list", false);
  setOpen("side", "show-map", false);
  watchMap();
}

// the conversation

function showState() {
  const { settings, title } = chat.here;
  const meta = chat.card?.meta;
  const busy = isBusy();
  $("send").textContent = busy ? "Stop" : "Send";
  $("send").classList.toggle("stop", busy);
  $("send").title = busy ? "Stop the answer (Esc)" : "";
  $("log").setAttribute("aria-busy", busy);
  if (meta) {
    const isLossy = settings.max_kld !== undefined && meta.modes.includes("auto");
    $("mode").value = meta.modes.includes(settings.mode) ? settings.mode : isLossy ? "auto" : meta.mode;
    document.title = `${title ? `${title} - ` : ""}${chat.card.id} - mobile-gguf`;
  }
  $("show-settings").classList.toggle("set", isSet(settings));
  paintList();
}

function sendWhatIsWritten() {
  const text = $("prompt").value.trim();
  if (isBusy() || !text || $("send").disabled || !chat.card) return;
  $("prompt").value = "";
  grow();
  send(text);
}

async function newChat() {
  await openNew();
  if (isNarrow()) setOpen("list", "show-list", false);
  $("prompt").focus();
}

const grow = () => fit($("prompt"));

function openSettings() {
  fill(chat.here.settings);
  $("settings").showModal();
}

function closeSettings() {
  const given = read();
  if (!given) return;
  const { mode } = chat.here.settings;
  setSettings(mode ? { ...given, mode } : given);
  $("settings").close();
}

// keys and buttons

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (isBusy()) stop();
  else sendWhatIsWritten();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    sendWhatIsWritten();
  } else if (event.key === "ArrowUp" && !$("prompt").value) {
    const last = chat.here.turns.findLast((turn) => turn.role === "user");
    if (last) {
      event.preventDefault();
      $("prompt").value = last.content;
      grow();
    }
  }
});
$("prompt").addEventListener("input", grow);
$("key").addEventListener("change", () => {
  access.key = $("key").value.trim();
  sessionStorage.setItem("key", access.key);
  connect();
});
$("key").addEventListener("keydown", (event) => {
  if (event.key === "Enter") {
    event.preventDefault();
    $("key").blur();
    $("prompt").focus();
  }
});
$("mode").addEventListener("change", () => setSettings({ ...chat.here.settings, mode: $("mode").value }));
$("new").addEventListener("click", newChat);
$("show-map").addEventListener("click", toggleMap);
$("show-list").addEventListener("click", toggleList);
$("show-settings").addEventListener("click", openSettings);
$("settings-done").addEventListener("click", closeSettings);
$("settings-clear").addEventListener("click", () => fill({}));
$("chats").addEventListener("click", (event) => {
  if (event.target.closest("a") && isNarrow()) setOpen("list", "show-list", false);
});
$("log").addEventListener("pointerdown", () => { if (isNarrow()) setOpen("list", "show-list", false); });
document.addEventListener("keydown", (event) => {
  if ($("settings").open) return;
  if (event.key === "Escape") {
    if (isNarrow() && !$("list").hidden) toggleList();
    else stop();
  }
  if (!event.altKey || event.ctrlKey || event.metaKey) return;
  const action = { KeyN: newChat, KeyM: toggleMap, KeyR: regenerate, KeyL: toggleList, KeyS: openSettings }[event.code];
  if (action) {
    event.preventDefault();
    action();
  }
});
document.addEventListener("visibilitychange", watchMap);
addEventListener("popstate", () => go(location.hash.slice(1)));

setOpen("list", "show-list", window.innerWidth > 1000);
shutPanels();
narrow.addEventListener("change", shutPanels);
chat.onChange = showState;
chat.onTrouble = (trouble) => {
  if (trouble.status === 401) askForKey();
  if (trouble.lost) connect();
};
let listing = 0;
await begin(() => {
  clearTimeout(listing);
  listing = setTimeout(paintList, 50);
});
await (location.hash ? go(location.hash.slice(1)) : paintList());
access.key = $("key").value = sessionStorage.getItem("key") ?? "";
const health = await ask("/health").then((response) => response.json()).catch(() => null);
const needsKey = health?.needs_key ?? false;
$("key-row").hidden = !needsKey;
if (needsKey && !$("key").value) {
  notice("");
  $("key").focus();
} else connect();
