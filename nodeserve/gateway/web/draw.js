"use strict";
// Elements, numbers and pictures. Text goes into the page as text and nothing here parses HTML;
// the page's policy (gateway/page.py) would refuse it.

const NOTHING = "–";
const byId = (id) => document.getElementById(id);

function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Only what changed is written: a reader's selection and a screen reader stay where they are. */
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Draw again only when `facts` differ from those that were drawn last. */
function redraw(node, facts, drawn) {
  const key = JSON.stringify(facts);
  if (node.drawnFrom === key) return;
  node.drawnFrom = key;
  node.replaceChildren(...drawn());
}

// ---- numbers

/** Three digits that matter, as people write them: 0.12, 1.23, 12.3, 123, 1,234. */
function digits(value) {
  const size = Math.abs(value);
  const places = size >= 99.95 || size === 0 ? 0 : size >= 9.995 ? 1 : 2;
  return value.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places });
}

const known = (value) => value !== null && value !== undefined;
const whole = (value) => (known(value) ? Math.round(value).toLocaleString("en") : NOTHING);
const rate = (value) => (known(value) ? digits(value) : NOTHING);
const percent = (share) => (known(share) ? `${Math.floor(100 * share + 1e-9)} %` : NOTHING);

function millis(ms) {
  if (!known(ms)) return NOTHING;
  return ms < 999.5 ? `${digits(ms)} ms` : `${digits(ms / 1000)} s`;
}

function duration(seconds) {
  const steps = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  for (const [size, unit] of steps) if (seconds >= size) return `${Math.floor(seconds / size)} ${unit}`;
  return "0 s";
}

/** A bound as somebody wrote it: no digits that say nothing. */
const limit = (ms) => (ms < 1000 ? `${Number(ms.toFixed(1))} ms` : `${Number((ms / 1000).toFixed(2))} s`);

/** 12.3K, 4.56M. */
const short = (value) => Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value);

const plural = (count, word) => `${whole(count)} ${word}${count === 1 ? "" : "s"}`;

// ---- pictures: stretched to their place, so sizes are shares of 100 and text stands beside

function canvas(label, ...children) {
  const how = { viewBox: "0 0 100 100", preserveAspectRatio: "none" };
  const named = label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" };
  return svg("svg", { ...how, ...named }, ...children);
}

/** Runs of values without a gap, as [place, value]; nulls are gaps. */
function runs(values) {
  const found = [];
  let current = null;
  values.forEach((value, place) => {
    if (!known(value)) current = null;
    else if (current) current.push([place, value]);
    else found.push((current = [[place, value]]));
  });
  return found;
}

/** Lines over `count` places that end at the right edge; a value alone is a short dash. */
function curve(values, top, count) {
  const width = 100 / Math.max(1, count - 1);
  const begin = 100 - width * (values.length - 1);
  const x = (place) => (begin + place * width).toFixed(2);
  const y = (value) => (100 - (100 * Math.min(value, top)) / top).toFixed(2);
  return runs(values).flatMap((run) => {
    const ends = run.length > 1 ? run : [[run[0][0] - 0.4, run[0][1]], run[0]];
    const line = ends.map(([place, value]) => `${x(place)} ${y(value)}`).join("L");
    const [from, to] = [x(ends[0][0]), x(ends[ends.length - 1][0])];
    return [
      svg("path", { class: "area", d: `M${from} 100L${line}L${to} 100Z` }),
      svg("path", { class: "line", d: `M${line}` }),
    ];
  });
}

const across = (className, y) => svg("line", { class: className, x1: 0, x2: 100, y1: y, y2: y });
const upright = (className, x) => svg("line", { class: className, x1: x, x2: x, y1: 0, y2: 100 });

function sparkline(values, count) {
  const top = Math.max(1e-9, ...values.filter(known)) * 1.1;
  return canvas("", across("grid", 100), ...curve(values, top, count));
}

/** A line of text below a picture; `marks` are [share of 100, words]. */
function markLine(marks) {
  const line = make("div", "marks");
  line.setAttribute("aria-hidden", "true");
  for (const [place, words] of marks) {
    const mark = make("span", place < 8 ? "first" : place > 92 ? "last" : "", words);
    mark.style.left = `${place}%`;
    line.append(mark);
  }
  return line;
}

/** Words beside a picture, each at its height: [share of 100 from the top, words]. */
function scale(marks) {
  return marks.map(([place, words]) => {
    const mark = make("span", "scale", words);
    mark.style.top = `${place}%`;
    mark.setAttribute("aria-hidden", "true");
    return mark;
  });
}

/** A list of terms and what they are. */
function facts(pairs) {
  const list = make("dl", "facts");
  for (const [term, value, kind = ""] of pairs) {
    list.append(make("div", kind, make("dt", "", term), make("dd", "", value)));
  }
  return list;
}

/** The same below each other, for values that change: a map of the nodes that hold them. */
function rows(list, terms) {
  return Object.fromEntries(terms.map((term) => {
    const value = make("dd", "", NOTHING);
    list.append(make("div", "", make("dt", "", term), value));
    return [term, value];
  }));
}

/** A bar that is filled to a share; `showShare` moves it. */
function meter() {
  const node = make("div", "meter", make("span"));
  node.setAttribute("aria-hidden", "true");
  return node;
}

function showShare(node, share, full) {
  node.firstChild.style.width = `${(100 * Math.min(1, share)).toFixed(1)}%`;
  node.dataset.full = full ? "yes" : "no";
}
