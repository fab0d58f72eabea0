// The expert map: where every expert is, and what the last token used, as the server tells it.

import { follow } from "/follow.js";
import { bytes } from "/receipt.js";

const $ = (id) => document.getElementById(id);
const NAMES = ["absent", "loading", "resident", "hit", "missed"];
const WORDS = ["in the file", "being read", "in memory", "hit", "missed"];
const HELP = $("map-here").textContent;
let watching = null;
let map = null;
let meta = {};

export function unwatch() {
  watching?.abort();
  watching = null;
}

// draws until somebody else watches or nobody does; true if the server was lost
export async function watch(of) {
  unwatch();
  meta = of;
  const mine = new AbortController();
  watching = mine;
  const isLost = await follow((now) => {
    map = now;
    draw();
  }, mine.signal);
  if (!isLost || watching !== mine) return false;
  $("map-note").textContent = "no connection to the server";
  return true;
}

function draw() {
  const tiers = Object.entries(map.tiers);
  for (const id of ["map-box", "map-here", "legend"]) $(id).hidden = !tiers.length;
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
  rows.forEach((row, y) => {
    for (let x = 0; x < row.length; x++) {
      const state = Number(row[x]);
      pen.fillStyle = colours[state];
      const left = Math.round(x * width), top = Math.round(y * height);
      pen.fillRect(left, top, Math.round((x + 1) * width) - left - gap, Math.round((y + 1) * height) - top - gap);
    }
  });
  const dense = map.dense_layers.length;
  $("map-size").textContent = `${rows.length} layers × ${map.n_expert}${dense ? ` (${dense} more without experts)` : ""}`;
  const all = rows.length * map.n_expert;
  const size = meta.expert_bytes ?? 0;
  const { host: resident, device } = map.resident;
  $("map-note").textContent = `${resident} of ${all} in memory` + (size ? `: about ${bytes((size * resident) / all)} of ${bytes(size)}` : "") + (device === undefined ? "" : `; ${device} on the device`);
}

function pointAt(event) {
  if (!map || !Object.keys(map.tiers).length) return;
  const box = $("map").getBoundingClientRect();
  const layer = Math.floor(((event.clientY - box.top) / box.height) * map.layers.length);
  const expert = Math.floor(((event.clientX - box.left) / box.width) * map.n_expert);
  const states = Object.entries(map.tiers).map(([name, rows]) => `${WORDS[Number(rows[layer]?.[expert] ?? 0)]} (${name})`);
  $("map-here").textContent = `layer ${map.layers[layer] ?? ""}, expert ${expert}: ${states.join(", ")}`;
}

$("map").addEventListener("pointermove", pointAt);
$("map").addEventListener("pointerleave", () => { $("map-here").textContent = HELP; });
window.addEventListener("resize", () => map && draw());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => map && draw());
