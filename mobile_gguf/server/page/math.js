// Formulas: where they are in a text, and what Temml makes of them, which is MathML. It is fetched with the first one.

import { make } from "/dom.js";

const MOST = 4000; // characters of one formula
const MOST_LINES = 100; // and lines
const made = new Map(); // MathML by source: while an answer comes, the same formulas are asked for with each word
let library = null; // a promise of Temml, once there was a formula

function fetched() {
  library ??= new Promise((resolve) => {
    const script = make("script");
    script.src = "/vendor/temml.js";
    script.addEventListener("load", () => resolve());
    script.addEventListener("error", () => { library = null; });
    document.head.append(script);
  });
  return library;
}

function typeset(source, display) {
  const key = `${display ? "display" : "inline"} ${source}`;
  if (!made.has(key)) {
    const box = make("span");
    try {
      // nothing that loads, links, or names classes; no formula larger than a page, no endless macros
      globalThis.temml.render(source, box, { displayMode: display, trust: false, throwOnError: true, maxSize: [20, 2000], maxExpand: 200 });
    } catch {
      box.replaceChildren();
    }
    const math = box.firstElementChild;
    // \label names an element, and could give it the name of one of the page's
    for (const node of box.querySelectorAll("[id]")) node.removeAttribute("id");
    const isSafe = math && !box.querySelector("a, img, script, iframe, object, [href], [src]");
    if (made.size > 2000) made.clear();
    made.set(key, isSafe ? math : null);
  }
  return made.get(key)?.cloneNode(true) ?? null;
}

// the formula, or its source where it cannot be read; before the library is there its source, which it replaces
export function formula(source, display) {
  const plain = make("code", source);
  plain.className = display ? "formula display" : "formula";
  if (source.length > MOST) return plain;
  const math = globalThis.temml ? typeset(source, display) : null;
  if (!globalThis.temml) fetched().then(() => plain.isConnected && plain.replaceWith(formula(source, display)));
  return math ?? plain;
}

const isEscaped = (text, at) => {
  let n = 0;
  while (text[at - 1 - n] === "\\") n++;
  return n % 2 === 1;
};

// where a mark closes what begins at `from`, looking no further than a formula may be long; -1
function endOf(text, mark, from) {
  const near = text.slice(from, from + MOST);
  for (let at = near.indexOf(mark); at >= 0; at = near.indexOf(mark, at + 1)) {
    if (!isEscaped(near, at)) return from + at;
  }
  return -1;
}

const MARKS = [["$$", "$$", true], ["\\[", "\\]", true], ["\\(", "\\)", false], ["$", "$", false]];

function inlineFormula(state, silent) {
  const text = state.src;
  const mark = MARKS.find(([open]) => text.startsWith(open, state.pos));
  if (!mark) return false;
  const [open, close, display] = mark;
  const from = state.pos + open.length;
  const end = endOf(text, close, from);
  if (end <= from || end + close.length > state.posMax) return false;
  const source = text.slice(from, end);
  // a price is none: "$5 and $6"
  if (open === "$" && (/^\s|\s$/.test(source) || /\d/.test(text[end + 1] ?? ""))) return false;
  if (!source.trim()) return false;
  if (!silent) {
    const token = state.push("formula", "math", 0);
    token.content = source.trim();
    token.info = display ? "display" : "";
  }
  state.pos = end + close.length;
  return true;
}

// on lines of its own, with whatever Markdown would make of them
function blockFormula(state, first, last, silent) {
  const start = state.bMarks[first] + state.tShift[first];
  const mark = MARKS.find(([open, , display]) => display && state.src.startsWith(open, start));
  if (!mark || state.sCount[first] - state.blkIndent >= 4) return false;
  const [open, close] = mark;
  const lines = [];
  for (let line = first; line < Math.min(last, first + MOST_LINES); line++) {
    if (line > first && state.sCount[line] < state.blkIndent && !state.isEmpty(line)) return false;
    const text = state.getLines(line, line + 1, state.blkIndent, false).trim();
    const from = line === first ? open.length : 0;
    const end = endOf(text, close, from);
    if (end < 0) {
      lines.push(text.slice(from));
      continue;
    }
    if (text.slice(end + close.length).trim()) return false;
    lines.push(text.slice(from, end));
    if (!lines.join("").trim()) return false;
    if (silent) return true;
    const token = state.push("formula", "math", 0);
    token.block = true;
    token.content = lines.join("\n").trim();
    token.map = [first, line + 1];
    state.line = line + 1;
    return true;
  }
  return false;
}

// a plugin of markdown-it; its escapes would take the backslash of \( first
export function addFormulas(parser) {
  parser.inline.ruler.before("escape", "formula", inlineFormula);
  parser.block.ruler.before("fence", "formula", blockFormula, { alt: ["paragraph", "blockquote", "list"] });
}
