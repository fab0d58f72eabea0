// What a model thought before it spoke: sent apart by the server, or between <think> and </think> in its words.

const OPEN = "<think>";
const CLOSE = "</think>";

const isAlone = (text, end) => {
  const [before, after] = [text.slice(0, end), text.slice(end + CLOSE.length)];
  return /\n[ \t]*$/.test(before.slice(-80)) && /^[ \t]*(\n|$)/.test(after) && !before.includes(OPEN);
};

// the thoughts and the words of a turn; `open` while it still thinks
export function parted({ content = "", thinking = "" }) {
  const text = content.trimStart();
  const begun = text.startsWith(OPEN);
  const end = text.indexOf(CLOSE);
  // a template may have opened the thoughts itself; their end has a line of its own then
  if (end >= 0 && (begun || isAlone(text, end))) {
    const thoughts = text.slice(begun ? OPEN.length : 0, end);
    return { thoughts: joined(thinking, thoughts), words: text.slice(end + CLOSE.length).trimStart(), open: false };
  }
  if (begun) return { thoughts: joined(thinking, text.slice(OPEN.length)), words: "", open: true };
  if (text && OPEN.startsWith(text)) return { thoughts: thinking, words: "", open: true };
  return { thoughts: thinking.trim(), words: content, open: !content && Boolean(thinking) };
}

const joined = (one, other) => [one.trim(), other.trim()].filter(Boolean).join("\n\n");
