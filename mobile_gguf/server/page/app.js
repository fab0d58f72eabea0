import { access, ask, events } from "/api.js";
import { render } from "/markdown.js";

const $ = (id) => document.getElementById(id);
const turns = []; // {role, content}; an answer that failed before its first word has failed: true
let running = null; // the AbortController of the answer being made
let card = null;

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
    card = (await (await ask("/v1/models")).json()).data[0];
  } catch (error) {
    notice(error.lost ? "No connection to the server: trying again." : error.message);
    if (error.status === 401) askForKey();
    else retry = setTimeout(connect, RETRY_MS);
    return;
  }
  notice(card.meta.chats ? "" : "This model makes embeddings and does not chat: see /v1/embeddings.");
  $("send").disabled = !card.meta.chats;
  $("model").textContent = card.meta.name || card.id;
  $("model").title = `${card.id}: ${card.meta.architecture}, ${card.meta.quantization}, context ${card.meta.n_ctx}`;
  document.title = `${card.id} - mobile-gguf`;
  const chosen = $("mode").value || card.meta.mode;
  $("mode").replaceChildren(...card.meta.modes.map((mode) => new Option(mode, mode, false, mode === chosen)));
  $("mode").disabled = card.meta.modes.length < 2;
  watchMap();
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// the conversation

const follows = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 60;
const toEnd = () => { $("log").scrollTop = $("log").scrollHeight; };

function addTurn(role, content) {
  $("hello").hidden = true;
  const node = document.createElement("article");
  node.className = `turn ${role}`;
  node.setAttribute("aria-label", role === "user" ? "You" : "Answer");
  const text = document.createElement("div");
  text.className = "text";
  const foot = document.createElement("div");
  foot.className = "foot";
  node.append(text, ...(role === "user" ? [] : [foot]));
  if (role === "user") text.textContent = content;
  $("log").append(node);
  toEnd();
  return { text, foot, node };
}

function bytes(n) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (n < 1024 || unit === "GiB") return `${unit === "B" ? n : n.toFixed(1)} ${unit}`;
    n /= 1024;
  }
}

function receiptText(usage) {
  const cost = usage.receipt;
  const kinds = [`${cost.tokens_big} big`];
  if (cost.mode !== "exact") kinds.push(`${cost.tokens_little} little`);
  if (cost.mode === "big-little") kinds.push(`${cost.tokens_fallback} fallback`);
  const parts = [kinds.join(" · ")];
  const asked = cost.expert_hits + cost.expert_misses;
  if (asked) parts.push(`${Math.floor((100 * cost.expert_hits) / asked)}% hits`, `${bytes(cost.bytes_read)} read`, `${Math.round(cost.stall_ms)} ms stalled`);
  if (cost.bytes_uploaded) parts.push(`${bytes(cost.bytes_uploaded)} uploaded`);
  parts.push(`${usage.tokens_per_second.toFixed(1)} tok/s`);
  return parts.join(" | ");
}

function span(text, name = "") {
  const node = document.createElement("span");
  node.textContent = text;
  node.className = name;
  return node;
}

// what the model is to read: an answer that failed is left out together with its question
function conversation() {
  return turns.filter((turn, i) => !turn.failed && !turns[i + 1]?.failed).map(({ role, content }) => ({ role, content }));
}

async function answer() {
  const shown = addTurn("assistant", "");
  const receipt = span("", "receipt");
  shown.foot.append(receipt);
  shown.text.classList.add("wait");
  const messages = conversation();
  const made = { role: "assistant", content: "" };
  turns.push(made);
  let cut = false;
  let trouble = null;
  let painted = true;
  const paint = () => {
    const follow = follows();
    shown.text.replaceChildren(render(made.content));
    painted = true;
    if (follow) toEnd();
  };
  const mine = new AbortController();
  running = mine;
  busy(true);
  notice("");
  try {
    const body = { messages, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
    if ($("mode").value) body.mode = $("mode").value;
    const stream = events("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal: mine.signal });
    for await (const chunk of stream) {
      if (chunk.usage) receipt.textContent = receiptText(chunk.usage);
      const choice = chunk.choices[0];
      made.content += choice?.delta?.content ?? "";
      cut = cut || choice?.finish_reason === "length";
      if (painted) {
        painted = false;
        requestAnimationFrame(paint);
      }
    }
  } catch (error) {
    trouble = error;
  }
  if (running === mine) {
    running = null;
    busy(false);
  }
  if (!shown.node.isConnected) return; // the conversation was cleared meanwhile
  paint();
  shown.text.classList.remove("wait");
  made.failed = Boolean(trouble) && !made.content;
  if (trouble) shown.foot.prepend(ending(trouble, made));
  if (cut) shown.foot.append(span("Cut at the token limit.", "bad"));
  if (!receipt.textContent) receipt.remove();
  shown.foot.append(againButton(made.failed));
  toEnd();
  if (trouble?.status === 401) askForKey();
  if (trouble?.lost) connect();
}

function ending(trouble, made) {
  if (trouble.name === "AbortError") return span(made.content ? "Stopped." : "Stopped before the first word.", "end");
  const node = span(trouble.message, "end bad");
  node.setAttribute("role", "alert");
  return node;
}

function againButton(failed) {
  document.querySelectorAll(".again").forEach((old) => old.remove());
  const again = document.createElement("button");
  again.type = "button";
  again.textContent = failed ? "Try again" : "Regenerate";
  again.title = "Answer again (Alt+R)";
  again.className = "again";
  again.addEventListener("click", regenerate);
  return again;
}

function busy(is) {
  $("send").textContent = is ? "Stop" : "Send";
  $("send").classList.toggle("stop", is);
  $("send").title = is ? "Stop the answer (Esc)" : "";
  $("log").setAttribute("aria-busy", is);
}

function send() {
  const text = $("prompt").value.trim();
  if (running || !text || $("send").disabled) return;
  $("prompt").value = "";
  grow();
  turns.push({ role: "user", content: text });
  addTurn("user", text);
  answer();
}

function regenerate() {
  if (running || turns.at(-1)?.role !== "assistant") return;
  turns.pop();
  $("log").lastElementChild.remove();
  answer();
}

function clearChat() {
  running?.abort();
  turns.length = 0;
  document.querySelectorAll(".turn").forEach((node) => node.remove());
  $("hello").hidden = false;
  $("prompt").focus();
}

function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
}

// the expert map

const NAMES = ["absent", "loading", "resident", "hit", "missed"];
let mapWatch = null;
let map = null;

async function watchMap() {
  mapWatch?.abort();
  if ($("side").hidden || !card) return;
  const watch = new AbortController();
  mapWatch = watch;
  try {
    for await (const now of events("/v1/experts?stream=true", { signal: watch.signal })) {
      map = now;
      drawMap();
    }
  } catch (error) {
    if (error.name === "AbortError") return;
  }
  if (mapWatch === watch) {
    $("map-note").textContent = "no connection to the server";
    clearTimeout(retry);
    retry = setTimeout(connect, RETRY_MS);
  }
}

function drawMap() {
  const tiers = Object.entries(map.tiers);
  $("map-box").hidden = !tiers.length;
  $("legend").hidden = !tiers.length;
  if (!tiers.length) {
    $("map-note").textContent = "This model has no expert store: nothing moves.";
    return;
  }
  const style = getComputedStyle(document.documentElement);
  const colours = NAMES.map((name) => style.getPropertyValue(`--${name}`));
  // where an expert is on a device, that is what is shown
  const rows = map.layers.map((_, at) => tiers.map(([, tier]) => tier[at]).reduce((host, device) =>
    [...host].map((state, i) => (device[i] === "0" ? state : device[i])).join("")));
  const canvas = $("map");
  const box = $("map-box").clientWidth;
  const room = Math.max(90, Math.min(window.innerHeight * (window.innerWidth <= 760 ? 0.2 : 0.68), rows.length * 18));
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(box * ratio);
  canvas.height = Math.round(room * ratio);
  canvas.style.height = `${room}px`;
  const pen = canvas.getContext("2d");
  const width = canvas.width / map.n_expert;
  const height = canvas.height / rows.length;
  const gap = width > 4 && height > 4 ? ratio : 0;
  let resident = 0;
  rows.forEach((row, y) => {
    for (let x = 0; x < row.length; x++) {
      const state = Number(row[x]);
      resident += state >= 2;
      pen.fillStyle = colours[state];
      const left = Math.round(x * width), top = Math.round(y * height);
      pen.fillRect(left, top, Math.round((x + 1) * width) - left - gap, Math.round((y + 1) * height) - top - gap);
    }
  });
  $("map-size").textContent = `${rows.length} layers × ${map.n_expert}`;
  $("map-note").textContent = `${resident} of ${rows.length * map.n_expert} in memory`;
}

function pointAt(event) {
  if (!map || !Object.keys(map.tiers).length) return;
  const box = $("map").getBoundingClientRect();
  const layer = Math.floor(((event.clientY - box.top) / box.height) * map.layers.length);
  const expert = Math.floor(((event.clientX - box.left) / box.width) * map.n_expert);
  const states = Object.entries(map.tiers).map(([name, rows]) => `${NAMES[Number(rows[layer]?.[expert] ?? 0)]} (${name})`);
  $("map-here").textContent = `layer ${map.layers[layer] ?? ""}, expert ${expert}: ${states.join(", ")}`;
}

function toggleMap() {
  $("side").hidden = !$("side").hidden;
  $("show-map").setAttribute("aria-expanded", !$("side").hidden);
  watchMap();
}

// keys and buttons

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else send();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !$("prompt").value) {
    const last = turns.findLast((turn) => turn.role === "user");
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
$("clear").addEventListener("click", clearChat);
$("show-map").addEventListener("click", toggleMap);
$("map").addEventListener("pointermove", pointAt);
$("map").addEventListener("pointerleave", () => { $("map-here").textContent = "\u00a0"; });
$("log").addEventListener("click", async (event) => {
  if (!event.target.classList.contains("copy")) return;
  try {
    await navigator.clipboard.writeText(event.target.previousSibling.textContent);
    event.target.textContent = "Copied";
  } catch {
    event.target.textContent = "Not allowed";
  }
  setTimeout(() => { event.target.textContent = "Copy"; }, 1500);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (!event.altKey || event.ctrlKey || event.metaKey) return;
  const action = { KeyN: clearChat, KeyM: toggleMap, KeyR: regenerate }[event.code];
  if (action) {
    event.preventDefault();
    action();
  }
});
window.addEventListener("resize", () => map && drawMap());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => map && drawMap());

if (window.innerWidth <= 760) {
  $("side").hidden = true;
  $("show-map").setAttribute("aria-expanded", false);
}
access.key = $("key").value = sessionStorage.getItem("key") ?? "";
const health = await ask("/health").then((response) => response.json()).catch(() => null);
const needsKey = health?.needs_key ?? false;
$("key-row").hidden = !needsKey;
if (needsKey && !$("key").value) {
  notice("");
  $("key").focus();
} else connect();
