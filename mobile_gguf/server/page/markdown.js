// Markdown as models write it: markdown-it reads it, and its tokens become DOM nodes here. Text never becomes HTML, so
// nothing in it can run; an address is a link only if it leads to the web, and nothing is loaded from one.

import { copyBy, make } from "/dom.js";
import { addFormulas, formula } from "/math.js";
import MarkdownIt from "/vendor/markdown-it.js";

const parser = new MarkdownIt({ html: false, linkify: true, breaks: true, maxNesting: 60 });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
parser.use(addFormulas);

const TAGS = {
  paragraph: "p", bullet_list: "ul", ordered_list: "ol", list_item: "li", blockquote: "blockquote",
  thead: "thead", tbody: "tbody", tr: "tr", th: "th", td: "td", strong: "strong", em: "em", s: "s",
};
const TASK = /^\[([ xX])\] /;

function linkTo(address) {
  let url = null;
  try {
    url = new URL(address);
  } catch { /* no address of the web */ }
  if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return make("span");
  const link = make("a");
  link.href = url.href;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  return link;
}

function codeBlock(text, language) {
  const code = text.replace(/\n$/, "");
  const bar = make("div", make("span", language), copyBy("Copy", "Copy this code", () => code));
  bar.className = "bar";
  const box = make("div", bar, make("pre", make("code", code)));
  box.className = "code";
  return box;
}

// the node that an opening token makes: [what is put into the page, what its content goes into]
function opened(token) {
  const kind = token.type.replace(/_open$/, "");
  if (kind === "link") return [linkTo(token.attrGet("href"))].flatMap((node) => [node, node]);
  if (kind === "heading") {
    const node = make(token.tag === "h1" || token.tag === "h2" ? "h2" : "h3");
    return [node, node];
  }
  if (kind === "table") {
    const table = make("table");
    const box = make("div", table);
    box.className = "wide";
    return [box, table];
  }
  const node = make(TAGS[kind] ?? "span");
  if (kind === "ordered_list" && token.attrGet("start") !== null) node.start = Number(token.attrGet("start"));
  if (kind === "th" || kind === "td") node.style.textAlign = /text-align:(\w+)/.exec(token.attrGet("style") ?? "")?.[1] ?? "";
  return [node, node];
}

function leaf(token, parent) {
  switch (token.type) {
    case "inline": {
      build(token.children, parent);
      return [];
    }
    case "code_inline": return [make("code", token.content)];
    case "softbreak": case "hardbreak": return [make("br")];
    case "hr": return [make("hr")];
    case "fence": return [codeBlock(token.content, /^[\w+#.-]*/.exec(token.info.trim())[0])];
    case "code_block": return [codeBlock(token.content, "")];
    case "formula": return [formula(token.content, token.block || token.info === "display")];
    case "image": {
      const link = linkTo(token.attrGet("src"));
      link.append(token.content || "image");
      return [link];
    }
    default: return [token.content];
  }
}

function build(tokens, root) {
  const stack = [root];
  for (const token of tokens) {
    if (token.hidden) continue; // paragraphs of a list without empty lines
    const parent = stack.at(-1);
    if (token.nesting > 0) {
      const [node, inner] = opened(token);
      parent.append(node);
      stack.push(inner);
    } else if (token.nesting < 0) stack.pop();
    else parent.append(...leaf(token, parent).filter((node) => node !== ""));
  }
}

function showTasks(out) {
  for (const item of out.querySelectorAll("li")) {
    const first = item.firstChild?.nodeName === "P" ? item.firstChild.firstChild : item.firstChild;
    const found = first?.nodeType === Node.TEXT_NODE && TASK.exec(first.data);
    if (found) {
      first.data = `${found[1] === " " ? "☐" : "☑"} ${first.data.slice(4)}`;
      item.classList.add("task");
    }
  }
}

const RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const FENCE = /^\s{0,3}(```+|~~~+)/;
const escaped = (line) => line.replace(/(`+)[^`]+\1(?!`)/g, (code) => code.replace(/(?<!\\)\|/g, "\\|"));

// a pipe in a table's code is the code's, as models mean it: Markdown's tables want it behind a backslash
function withPipes(text) {
  if (!text.includes("|") || !text.includes("`")) return text;
  const lines = text.split("\n");
  let fence = "";
  let isTable = false;
  for (const [i, line] of lines.entries()) {
    const mark = FENCE.exec(line)?.[1];
    if (fence ? mark?.startsWith(fence) : mark) fence = fence ? "" : mark;
    isTable = !fence && line.includes("|") && (isTable || RULE.test(lines[i + 1] ?? ""));
    if (isTable) lines[i] = escaped(line);
  }
  return lines.join("\n");
}

export function render(text) {
  const out = document.createDocumentFragment();
  build(parser.parse(withPipes(text), {}), out);
  // what is nested deeper than anybody means is left out by the parser
  if (!out.textContent.trim() && text.trim() && !out.querySelector("hr")) out.replaceChildren(make("p", text));
  showTasks(out);
  return out;
}
