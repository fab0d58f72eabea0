// Markdown as models write it, built of DOM nodes: text never becomes HTML, so nothing in it can run.

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(\S|\S[\s\S]*?\S)\*\*|(?<![\w*])\*(?=\S)([^*]*[^*\s])\*(?![\w*])|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/g;

function make(tag, ...children) {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
}

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    nodes.push(text.slice(end, found.index));
    end = found.index + found[0].length;
    const [, , code, bold, italic, label, address] = found;
    if (code !== undefined) nodes.push(make("code", code));
    else if (bold !== undefined) nodes.push(make("strong", ...inline(bold)));
    else if (italic !== undefined) nodes.push(make("em", ...inline(italic)));
    else {
      const link = make("a", label);
      link.href = address;
      link.target = "_blank";
      link.rel = "noopener noreferrer";
      nodes.push(link);
    }
  }
  nodes.push(text.slice(end));
  return nodes.filter((node) => node !== "");
}

function codeBlock(lines, language) {
  const copy = make("button", "Copy");
  copy.type = "button";
  copy.className = "copy";
  const bar = make("div", make("span", language), copy);
  bar.className = "bar";
  const box = make("div", bar, make("pre", make("code", lines.join("\n"))));
  box.className = "code";
  return box;
}

function list(lines, pattern, tag) {
  const node = make(tag);
  for (const line of lines) {
    const item = line.match(pattern);
    if (item) node.append(make("li", ...inline(item[1])));
    else if (node.lastChild) node.lastChild.append("\n", ...inline(line.trim()));
  }
  return node;
}

// cells of a table's line; a pipe in code or behind a backslash is none
const cells = (line) => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|(?=(?:[^`]*`[^`]*`)*[^`]*$)/).map((cell) => cell.trim().replace(/\\\|/g, "|"));
const RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

function table(lines) {
  const row = (line, tag) => make("tr", ...cells(line).map((cell) => make(tag, ...inline(cell))));
  const node = make("table", make("thead", row(lines[0], "th")), make("tbody", ...lines.slice(2).map((line) => row(line, "td"))));
  const box = make("div", node);
  box.className = "wide";
  return box;
}

const KINDS = [
  [/^\s{0,3}[-*+]\s+(.*)$/, "ul"],
  [/^\s{0,3}\d{1,9}[.)]\s+(.*)$/, "ol"],
];

export function render(text) {
  const out = document.createDocumentFragment();
  const lines = text.split("\n");
  let i = 0;
  const paragraph = [];
  const flush = () => {
    if (paragraph.length) {
      const node = make("p");
      paragraph.forEach((line, at) => node.append(...(at ? [make("br")] : []), ...inline(line)));
      out.append(node);
    }
    paragraph.length = 0;
  };
  while (i < lines.length) {
    const line = lines[i];
    const fence = line.match(/^\s{0,3}(```+|~~~+)\s*([\w+#.-]*)/);
    const heading = line.match(/^#{1,6}\s+(.*?)\s*#*$/);
    const kind = KINDS.find(([pattern]) => pattern.test(line));
    if (fence) {
      flush();
      const body = [];
      for (i++; i < lines.length && !lines[i].trim().startsWith(fence[1]); i++) body.push(lines[i]);
      out.append(codeBlock(body, fence[2]));
    } else if (heading) {
      flush();
      out.append(make(line.startsWith("## ") || line.startsWith("# ") ? "h3" : "h4", ...inline(heading[1])));
    } else if (kind) {
      flush();
      const items = [];
      for (; i < lines.length && lines[i].trim() && (kind[0].test(lines[i]) || /^\s{2,}/.test(lines[i])); i++) items.push(lines[i]);
      out.append(list(items, kind[0], kind[1]));
      continue;
    } else if (line.includes("|") && RULE.test(lines[i + 1] ?? "") && cells(line).length === cells(lines[i + 1]).length) {
      flush();
      const rows = [];
      for (; i < lines.length && lines[i].includes("|"); i++) rows.push(lines[i]);
      out.append(table(rows));
      continue;
    } else if (/^\s{0,3}>/.test(line)) {
      flush();
      const quoted = [];
      for (; i < lines.length && /^\s{0,3}>/.test(lines[i]); i++) quoted.push(lines[i].replace(/^\s*>\s?/, ""));
      out.append(make("blockquote", ...inline(quoted.join("\n"))));
      continue;
    } else if (line.trim()) paragraph.push(line);
    else flush();
    i++;
  }
  flush();
  return out;
}
