// The operations page: asks for the figures again and again, and draws what changed in between.
import { Chart, digits } from "./charts.js";

const tiles = document.querySelector("[data-figures]"), POLL = 2000, KEPT = 300;
const KEY = "operations";

export const seconds = (value) => value === null || value === undefined ? "–"
  : value < 1e-3 ? `${Math.round(value * 1e6)} µs` : value < 1 ? `${digits(value * 1e3)} ms` : `${digits(value)} s`;

/** As Prometheus's histogram_quantile, over counts per bucket. */
function quantile(q, bounds, counts) {
  const all = counts.reduce((a, b) => a + b, 0);
  if (!all) return null;
  let passed = 0, low = 0;
  for (let i = 0; i < bounds.length; i++) {
    if (counts[i] && passed + counts[i] >= q * all) return low + (bounds[i] - low) * (q * all - passed) / counts[i];
    passed += counts[i];
    low = bounds[i];
  }
  return low;
}

const minus = (now, before) => now.map((value, i) => value - (before?.[i] ?? 0));
const sum = (rows, name) => rows.reduce((all, row) => all + row[name], 0);

function together(rows) {
  if (!rows.length) return { bounds: [], counts: [] };
  return { bounds: rows[0].bounds, counts: rows[0].counts.map((_, i) => rows.reduce((all, row) => all + row.counts[i], 0)) };
}

function difference(now, before) {
  const rows = (name) => {
    const known = new Map(before[name].map((row) => [row.name, row]));
    return now[name].map((row) => ({ ...row, counts: minus(row.counts, known.get(row.name)?.counts) }));
  };
  return { routes: rows("routes"), store: rows("store") };
}

let previous = null;
let points = [];
try { points = JSON.parse(sessionStorage.getItem(KEY) ?? "[]").filter((point) => point[0] > Date.now() / 1000 - KEPT * POLL / 1000); } catch { /* none then */ }

const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const line = (stroke, extra) => ({ stroke, spanGaps: false, ...extra });
const charts = tiles ? Object.fromEntries(Object.entries({
  rates: { series: [line("accent"), line("muted")], names: ["requests", "folds"], format: digits, columns: [1, 2] },
  times: { series: [line("accent"), line("accent", { dash: [6, 4] }), line("muted")], names: ["p50", "p95", "p99"], format: seconds, columns: [3, 4, 5] },
  queue: { series: [line("accent"), line("muted")], names: ["running", "queued"], format: digits, columns: [6, 7] },
  store: { series: [line("accent"), line("accent", { dash: [6, 4] }), line("muted")], names: ["p50", "p95", "p99"], format: seconds, columns: [8, 9, 10] },
}).map(([name, { series, names, format, columns }]) => {
  const element = document.querySelector(`[data-series="${name}"]`);
  const caption = element.parentElement.querySelector("figcaption").textContent;
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", caption);
  const chart = new Chart(element, {
    series, x: { scale: { time: true }, axis: { values: (_, ticks) => ticks.map((tick) => CLOCK.format(tick * 1000)), space: 90 } }, sync: "operations",
    y: { scale: { range: (_, low, high) => [0, (high || 1) * 1.1] }, axis: { values: (_, ticks) => ticks.map((tick) => (tick ? format(tick) : "0")), size: 60 } },
    read: (data, i) => names.map((one, n) => `${one} ${format(data[n + 1][i])}`).join("  "),
  });
  chart.say_nothing("Waiting for the second reading");
  return [name, { chart, columns }];
})) : {};

function draw() {
  if (points.length < 2) return;
  const column = (n) => points.map((point) => point[n]);
  for (const { chart, columns } of Object.values(charts)) chart.show([column(0), ...columns.map(column)]);
  const minutes = (points.at(-1)[0] - points[0][0]) / 60;
  document.getElementById("span").textContent = `Last ${minutes < 1 ? "minute" : `${Math.round(minutes)} min`}, every ${POLL / 1000} s`;
}

function fill(table, rows, changed, elapsed) {
  const body = table.tBodies[0], known = new Map([...body.rows].map((row) => [row.dataset.name, row]));
  rows.forEach((row, place) => {
    let line = known.get(row.name);
    if (!line) {
      line = document.createElement("tr");
      line.dataset.name = row.name;
      const head = document.createElement("th"), code = document.createElement("code");
      head.scope = "row";
      row.name.split(/(?<=[._/-])/).forEach((part, i) => code.append(...(i ? [document.createElement("wbr")] : []), part));
      head.append(code);
      line.append(head);
      for (let i = 0; i < 6; i++) { const cell = line.insertCell(); cell.className = [1, 2, 5].includes(i) ? "num wide" : "num"; }
      body.append(line);
    }
    if (body.rows[place] !== line) body.insertBefore(line, body.rows[place]);
    const all = row.counts.reduce((a, b) => a + b, 0);
    const now = changed?.find((each) => each.name === row.name);
    const rate = now ? now.counts.reduce((a, b) => a + b, 0) / elapsed : null;
    const texts = [all.toLocaleString("en"), rate === null ? "–" : rate ? digits(rate) : "0", row.failed.toLocaleString("en"),
      ...[0.5, 0.95, 0.99].map((q) => seconds(quantile(q, row.bounds, row.counts)))];
    texts.forEach((text, i) => { if (line.cells[i + 1].textContent !== text) line.cells[i + 1].textContent = text; });
  });
}

async function read() {
  let figures;
  try {
    const response = await fetch(tiles.dataset.figures, { headers: { Accept: "application/json" }, cache: "no-store", redirect: "manual" });
    if (response.type === "opaqueredirect" || response.status === 401) return location.reload();
    if (!response.ok) throw new Error(String(response.status));
    figures = await response.json();
  } catch {
    const late = document.getElementById("late");
    late.textContent = "Reconnecting";
    late.hidden = false;
    previous = null;
    return;
  }
  document.getElementById("late").hidden = true;
  const at = performance.now() / 1000;
  const same = previous && previous.figures.host === figures.host && previous.figures.counters.requests_total <= figures.counters.requests_total;
  const elapsed = same ? at - previous.at : null;
  const changed = same ? difference(figures, previous.figures) : null;
  if (same) {
    const rate = (name) => (figures.counters[name] - previous.figures.counters[name]) / elapsed;
    const calls = together(changed.routes), store = together(changed.store);
    const quantiles = ({ bounds, counts }) => [0.5, 0.95, 0.99].map((q) => quantile(q, bounds, counts));
    points.push([Date.now() / 1000, rate("requests_total"), rate("folds_total"), ...quantiles(calls), figures.gauges.running_calls, figures.gauges.queued_updates, ...quantiles(store)]);
    points = points.slice(-KEPT);
    try { sessionStorage.setItem(KEY, JSON.stringify(points)); } catch { /* they end with the page then */ }
    for (const element of document.querySelectorAll("[data-rate]")) element.textContent = digits(rate(element.dataset.rate));
  }
  const all = together(figures.routes);
  for (const element of document.querySelectorAll("[data-quantile]")) element.textContent = seconds(quantile(Number(element.dataset.quantile), all.bounds, all.counts));
  for (const element of document.querySelectorAll("[data-failed]")) element.textContent = sum(figures.routes, "failed").toLocaleString("en");
  for (const element of document.querySelectorAll("[data-gauge]")) element.textContent = figures.gauges[element.dataset.gauge].toLocaleString("en");
  fill(document.getElementById("routes"), figures.routes, changed?.routes, elapsed);
  fill(document.getElementById("store"), figures.store, changed?.store, elapsed);
  previous = { at, figures };
  draw();
}

if (tiles) {
  const loop = async () => { if (!document.hidden) await read(); setTimeout(loop, POLL); };
  draw();
  loop();
}
