"use strict";
// The panels but the layout, from what `/nodeserve/view` says.

const GOAL = 0.9; // of attainment: goodput is the rate at which so many meet their SLO
const SERIES_POINTS = 60; // of what the node remembers
const SPAN_WORDS = new Map([[10, "10 s"], [60, "1 min"], [300, "5 min"]]);

const spanOf = (view, seconds) => view.spans.find((span) => span.seconds === seconds);
const spanWords = (span) => SPAN_WORDS.get(span.seconds) ?? duration(span.seconds);

function showPanels(view) {
  showHead(view);
  showVerdict(view);
  showTiles(view);
  showTotals(view);
  showAttainment(view);
  showBlame(view);
  showLatency(byId("ttft"), view, "ttft_ms", "time to first token");
  showLatency(byId("tpot"), view, "tpot_ms", "time per output token");
  showMisses(view.misses);
}

function showHead(view) {
  say(byId("about"), `${view.model} · up ${duration(view.uptime_s)}`);
  document.title = `${view.model} · nodeserve`;
}

function showVerdict(view) {
  say(byId("verdict-text"), view.verdict);
  const { attainment } = spanOf(view, 60);
  const kind = !known(attainment) ? "none" : attainment >= GOAL ? "good" : "bad";
  byId("verdict").dataset.kind = kind;
  const reasons = byId("reasons");
  reasons.hidden = !view.reasons.length;
  say(reasons, `The server is ${view.state}: ${view.reasons.join("; ")}`);
}

// ---- figures

const tiles = new Map();

function tile(name) {
  if (!tiles.has(name)) {
    const value = make("span", "value", NOTHING);
    const parts = { value, more: make("dd", "more"), line: make("dd", "spark") };
    const unit = make("span", "unit");
    const number = make("dd", "", value, " ", unit);
    byId("tiles").append(make("div", "panel tile", make("dt", "", name), number, parts.more, parts.line));
    tiles.set(name, { ...parts, unit });
  }
  return tiles.get(name);
}

function showTile(name, value, unit, more, series) {
  const parts = tile(name);
  say(parts.value, value);
  say(parts.unit, unit);
  say(parts.more, more);
  redraw(parts.line, series, () => [sparkline(series, SERIES_POINTS)]);
}

function showTiles(view) {
  const { series, rates } = view;
  const minute = spanOf(view, 60);
  const quick = (spread) => (spread ? `P50 ${millis(spread.p50)}` : "none in a minute");
  showTile("Goodput, 1 min", ...goodputWords(minute), series.goodput_per_s);
  const [ttft, tpot] = [minute.ttft_ms, minute.tpot_ms];
  showTile("TTFT P90, 1 min", ...parted(ttft?.p90), quick(ttft), series.ttft_p90_ms);
  showTile("TPOT P90, 1 min", ...parted(tpot?.p90), quick(tpot), series.tpot_p90_ms);
  const prompts = `${rate(rates.prompt_tokens_per_s)} of prompts`;
  showTile("Output now", rate(rates.output_tokens_per_s), "tokens/s", prompts, outputSeries(view));
}

/** Without objectives there is no goodput, which is not none. */
function goodputWords({ offered, goodput_per_s, ended_per_s }) {
  const ended = ended_per_s ? `${rate(ended_per_s)} ended` : "none ended";
  if (!offered) return [NOTHING, "", `${ended}, no objectives`];
  return [rate(goodput_per_s), "req/s", `of ${ended}`];
}

const outputs = { pid: null, values: [], taken_s: 0 };

/** The node remembers no token rates, so this page does, from when it was opened. */
function outputSeries(view) {
  const isOther = outputs.pid !== view.pid || view.uptime_s < outputs.taken_s;
  if (isOther) Object.assign(outputs, { pid: view.pid, values: [], taken_s: -Infinity });
  if (view.uptime_s - outputs.taken_s >= view.series.step_s) {
    outputs.taken_s = view.uptime_s;
    outputs.values = [...outputs.values, view.rates.output_tokens_per_s].slice(-SERIES_POINTS);
  }
  return outputs.values;
}

/** A number and its unit apart. */
function parted(ms) {
  const [number, unit = ""] = millis(ms).split(" ");
  return [number, unit];
}

/** Since the node began. */
function showTotals({ requests, loop_lag_ms }) {
  const counts = ["running", "finished", "failed", "cancelled", "rejected"];
  const pairs = counts.map((name) => [name, whole(requests[name])]);
  pairs.push(["loop lag", millis(loop_lag_ms)]);
  redraw(byId("totals"), pairs, () => [facts(pairs)]);
}

// ---- attainment

function objectivesWords(slo) {
  const bounds = [["TTFT", slo.ttft_ms], ["TPOT", slo.tpot_ms]].filter(([, ms]) => known(ms));
  return bounds.map(([name, ms]) => `${name} ≤ ${limit(ms)}`).join(", ");
}

function showAttainment(view) {
  say(byId("objectives"), objectivesWords(view.slo));
  const shares = view.spans.map((span) => [spanWords(span), percent(span.attainment)]);
  const values = view.series.attainment;
  redraw(byId("attainment"), [shares, values], () => {
    if (!values.some(known)) {
      return [empty("No request with an objective in 5 minutes")];
    }
    const label = `Attainment over the last 5 minutes: ${shares.map((pair) => pair.join(" ")).join(", ")}`;
    const lines = [0, 50, 100].map((y) => across("grid", y));
    const goal = across("goal", 100 - 100 * GOAL);
    const picture = canvas(label, ...lines, goal, ...curve(values, 1, SERIES_POINTS));
    const plot = make("div", "plot scaled", picture, ...scale([[10, "90 %"], [50, "50 %"], [100, "0 %"]]));
    const span_s = view.series.step_s * (SERIES_POINTS - 1);
    const marks = markLine([[0, `${Math.round(span_s / 60)} min ago`], [100, "now"]]);
    marks.classList.add("scaled");
    return [make("figure", "", plot, marks), facts(shares)];
  });
}

function empty(words) {
  return make("p", "empty", words);
}

// ---- latencies

const RATIO = Math.SQRT2; // of a bin's edges
const BINS_AT_LEAST = 9;
const BINS_TO_BOUND = 5; // more of them are not shown empty for the sake of an objective

/** [upper edge, count] with room at both sides, for the objective too where it is near. */
function roomy(bins, bound) {
  if (!bins.length) return [];
  const wide = [...bins];
  const append = () => wide.push([wide[wide.length - 1][0] * RATIO, 0]);
  const prepend = () => wide.unshift([wide[0][0] / RATIO, 0]);
  append();
  prepend();
  while (wide.length < BINS_AT_LEAST) (wide.length % 2 ? append : prepend)();
  const away = known(bound) ? Math.log(bound / wide[wide.length - 1][0]) / Math.log(RATIO) : 0;
  for (let step = 0; away <= BINS_TO_BOUND && step < away + 0.5; step += 1) append();
  return wide;
}

/** Where a time stands on the axis of these bins, which is logarithmic, as a share of 100. */
function placeOf(ms, bins) {
  return (100 * (Math.log(ms / bins[0][0]) / Math.log(RATIO) + 1)) / bins.length;
}

function showLatency(node, view, key, words) {
  const bound = view.slo[key] ?? null;
  const bins = roomy(view.histograms[key], bound);
  const spread = spanOf(view, 300)[key];
  redraw(node, [bins, bound, spread], () => {
    if (!bins.length || !spread) return [empty("Nothing to show yet")];
    const top = Math.max(...bins.map(([, count]) => count));
    const width = 100 / bins.length;
    const bars = bins.map(([upper, count], place) => {
      const height = (100 * count) / top;
      const late = known(bound) && upper / RATIO >= bound * 0.999;
      const size = { x: place * width + 0.1 * width, width: 0.8 * width, y: 100 - height, height };
      return svg("rect", { class: late ? "bar late" : "bar", ...size });
    });
    const numbers = [["P50", spread.p50], ["P90", spread.p90], ["P99", spread.p99]];
    const pairs = numbers.map(([name, ms]) => [name, millis(ms)]);
    const at = known(bound) ? placeOf(bound, bins) : -1;
    const line = at >= 0 && at <= 100 ? [upright("limit", at)] : [];
    const label = `Histogram of the ${words}: ${pairs.map((pair) => pair.join(" ")).join(", ")}`;
    const plot = make("div", "plot", canvas(label, across("grid", 100), ...bars, ...line));
    const asked = known(bound) ? [["objective", limit(bound), line.length ? "bound" : ""]] : [];
    const counted = ["requests", whole(spread.count)];
    return [make("figure", "", plot, markLine(latencyMarks(bins))), facts([...pairs, ...asked, counted])];
  });
}

/** Some upper edges, so far from each other that they fit on a phone. */
function latencyMarks(bins) {
  const step = Math.max(1, Math.ceil(bins.length / 5));
  const chosen = bins.map(([upper], place) => [((place + 1) * 100) / bins.length, millis(upper)]);
  return chosen.filter((_, place) => place % step === step - 1);
}

// ---- misses

function showBlame(view) {
  const span = spanOf(view, 300);
  const found = Object.entries(span.missed).sort((one, other) => other[1] - one[1]);
  const total = found.reduce((sum, [, count]) => sum + count, 0);
  say(byId("blame-span"), total ? `${whole(total)} of ${whole(span.offered)} in ${spanWords(span)}` : "");
  redraw(byId("blame"), [found, span.offered > 0], () => {
    if (!total) return [empty(span.offered ? "None missed in 5 minutes" : "No request with an objective in 5 minutes")];
    const rows = found.map(([name, count]) => {
      const bar = meter();
      showShare(bar, count / total, false);
      const numbers = [whole(count), percent(count / total)].map((words) => make("span", "number", words));
      return make("li", "", make("span", "", name), bar, ...numbers);
    });
    return [make("ul", "shares", ...rows)];
  });
}

const MISS_COLUMNS = [
  ["Ago", "number ago", () => ""],
  ["Blame", "", (miss) => miss.blame],
  ["TTFT", "number", (miss) => [miss.ttft_ms, miss.slo.ttft_ms]],
  ["TPOT", "number", (miss) => [miss.tpot_ms, miss.slo.tpot_ms]],
  ["Tokens in", "number wide", (miss) => whole(miss.prompt_tokens)],
  ["out", "number wide", (miss) => whole(miss.output_tokens)],
  ["Workers", "wide", (miss) => workersWords(miss)],
];

function workersWords(miss) {
  const passed = [miss.prefill_worker, miss.decode_worker].filter((index) => known(index) && index >= 0);
  return [...new Set(passed)].map((index) => `w${index}`).join(" → ") || NOTHING;
}

function showMisses(misses) {
  const box = byId("misses");
  const lasting = misses.map(({ ago_s, ...rest }) => rest);
  redraw(box, lasting, () => {
    if (!misses.length) return [empty("None so far")];
    const head = MISS_COLUMNS.map(([name, kind]) => headCell(name, kind.replace(" ago", "")));
    const rows = misses.map((miss) => make("tr", "", ...MISS_COLUMNS.map(([, kind, read]) => cell(kind, read(miss)))));
    const table = make("table", "", make("thead", "", make("tr", "", ...head)), make("tbody", "", ...rows));
    table.setAttribute("aria-labelledby", "misses-title");
    return [make("div", "table", table)];
  });
  box.querySelectorAll(".ago").forEach((node, place) => say(node, duration(misses[place].ago_s)));
}

function headCell(name, kind) {
  const node = make("th", kind, name);
  node.scope = "col";
  return node;
}

/** Words, or a time and its bound: late ones are marked by more than a colour. */
function cell(kind, content) {
  if (!Array.isArray(content)) return make("td", kind, content);
  const [ms, bound] = content;
  const late = known(ms) && known(bound) && ms > bound;
  return make("td", late ? `${kind} bad` : kind, late ? `▲ ${millis(ms)}` : millis(ms));
}
