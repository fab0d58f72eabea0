// What a conversation asks the server for: the system prompt, and how answers are sampled.

import { $ } from "/dom.js";

// [name, lowest, highest, whole numbers only]; what the page's fields and files may say
const NUMBERS = [
  ["temperature", 0, 100, false],
  ["top_p", 0, 1, false],
  ["max_tokens", 1, 2 ** 31 - 1, true],
  ["seed", 0, Number.MAX_SAFE_INTEGER, true],
  ["max_kld", 0, 100, false],
];

const isAllowed = (value, [, low, high, whole]) => Number.isFinite(value) && value >= low && value <= high && (!whole || Number.isInteger(value));

// settings without what is none
export function cleaned(given) {
  const found = {};
  if (!given || typeof given !== "object") return found;
  if (typeof given.system === "string" && given.system.trim()) found.system = given.system;
  if (typeof given.mode === "string" && /^[a-z-]{1,20}$/.test(given.mode)) found.mode = given.mode;
  if (["on", "off"].includes(given.thinking)) found.thinking = given.thinking;
  for (const number of NUMBERS) if (isAllowed(given[number[0]], number)) found[number[0]] = given[number[0]];
  return found;
}

// the fields of a request
export function asRequest(settings, modes) {
  const { system, thinking, max_kld, mode, ...fields } = settings;
  if (modes.includes(mode)) fields.mode = mode;
  // the server takes it to mean mode auto, and beside another mode as a mistake
  if (max_kld !== undefined && modes.includes("auto") && (mode === undefined || mode === "auto")) fields.max_kld = max_kld;
  if (thinking) fields.chat_template_kwargs = { enable_thinking: thinking === "on" };
  return fields;
}

const fieldOf = (name) => $(`set-${name.replaceAll("_", "-")}`);

// what the server does where nothing is set stands in the empty fields
export function showDefaults({ defaults = {}, modes }) {
  for (const [name] of NUMBERS) {
    const value = defaults[name];
    const words = { max_tokens: "until it ends", seed: "random", max_kld: "as loaded" };
    fieldOf(name).placeholder = value === null || value === undefined || value < 0 ? words[name] ?? "" : `${+Number(value).toPrecision(6)}`;
  }
  fieldOf("max_kld").closest("label").hidden = !modes.includes("auto");
}

export function fill(settings) {
  $("set-system").value = settings.system ?? "";
  $("set-thinking").value = settings.thinking ?? "";
  for (const [name] of NUMBERS) fieldOf(name).value = settings[name] ?? "";
}

// what the fields say beside the mode; null, with the field that is wrong shown, if one is
export function read() {
  const given = { system: $("set-system").value, thinking: $("set-thinking").value };
  for (const number of NUMBERS) {
    const field = fieldOf(number[0]);
    const value = field.valueAsNumber;
    const isEmpty = field.value === "" && !field.validity.badInput;
    const right = isEmpty || isAllowed(value, number);
    field.setCustomValidity(right ? "" : `${number[3] ? "A whole number" : "A number"} from ${number[1]} to ${number[2]}, or nothing`);
    if (!field.reportValidity()) return null;
    if (!isEmpty) given[number[0]] = value;
  }
  return cleaned(given);
}

export const isSet = (settings) => Object.keys(settings).some((name) => name !== "mode");
