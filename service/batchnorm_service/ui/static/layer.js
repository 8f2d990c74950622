// A layer's page: charts and table of its channels, and the histogram of a batch.
import { Chart, digits } from "./charts.js";

const section = document.getElementById("channels");
const column = (series) => series?.high ?? series?.low;

// --- charts ---
const SHOWN = {
  mean: { columns: (s) => [s.lower?.low, s.mean.low, column(s.mean), column(s.upper)], bands: [{ series: [4, 1] }],
    series: [{ stroke: "accent", width: 0 }, {}, {}, { width: 0 }],
    read: (data, i) => `μ ${digits(data[2][i])}  σ ${digits((data[4][i] - data[1][i]) / 2)}` },
  std: { columns: (s) => [s.std.low, column(s.std)], read: (data, i) => `σ ${digits(data[1][i])}` },
  weight: { columns: (s) => [s.weight.low, column(s.weight)], read: (data, i) => `γ ${digits(data[1][i])}` },
  bias: { columns: (s) => [s.bias.low, column(s.bias)], read: (data, i) => `β ${digits(data[1][i])}` },
};

const drawn = [...section.querySelectorAll("[data-chart]")].map((element) => {
  const { columns, bands, series, read } = SHOWN[element.dataset.chart];
  const name = element.dataset.chart;
  const chart = new Chart(element, {
    series: series ?? [{}, {}],
    bands: bands ?? [{ series: [2, 1] }],
    sync: "channels",
    dense: Number(section.dataset.channels) > 1000,
    x: { axis: { values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? tick.toLocaleString("en") : "")) } },
    y: { scale: { range: (_, low, high) => around(low, high) } },
    read: (data, i) => `channel ${data[0][i].toLocaleString("en")}${step > 1 ? "…" : ""}  ${step > 1 ? `${digits(data[1][i])} to ${digits(data.at(-1)[i])}` : read(data, i)}`,
  });
  return { name, chart, columns };
});

function around(low, high) {
  if (low === null) return [-1, 1];
  const space = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low - space, high + space];
}

let step = 1, tag = null, series = null, seen = null; // what was read of the values and of the drift

async function load() {
  const headers = { Accept: "application/json" };
  if (tag) headers["If-None-Match"] = tag;
  let response;
  try {
    response = await fetch(section.dataset.values, { headers, cache: "no-store" });
  } catch { return; } // the page itself says that it is not up to date
  if (!response.ok) return;
  tag = response.headers.get("ETag");
  const values = await response.json();
  step = values.step;
  series = values.series;
  const points = Math.ceil(values.channels / step);
  const x = Array.from({ length: points }, (_, i) => i * step);
  for (const { name, chart, columns } of drawn) {
    if (!series[name]) chart.say_nothing("Not kept by this layer");
    else chart.show([x, ...columns(series)]);
  }
  showTable();
}

// --- the table of every channel ---
const box = document.getElementById("channel-table"), PAGE = 12;
const LABELS = { channel: "Channel", mean: "Mean μ", std: "Std σ", weight: "Weight γ", bias: "Bias β", z: "Drift z" };
let order = ["channel", 1], page = 0, marked = -1;

function showTable() {
  const columns = { ...series, ...(seen?.z && seen.batches ? { z: { low: seen.z } } : {}) };
  const names = Object.keys(LABELS).filter((name) => name === "channel" || columns[name]);
  box.hidden = step > 1 || names.length < 2;
  if (box.hidden) return;
  const value = (name, i) => (name === "channel" ? i : columns[name].low[i]);
  const count = columns[names[1]].low.length;
  const [by, way] = order;
  const index = Array.from({ length: count }, (_, i) => i);
  if (by !== "channel") index.sort((a, b) => way * ((value(by, a) ?? -Infinity) - (value(by, b) ?? -Infinity)) || a - b);
  else if (way < 0) index.reverse();
  page = Math.max(0, Math.min(page, Math.ceil(count / PAGE) - 1));
  if (marked >= 0) { page = Math.floor(index.indexOf(marked) / PAGE); }
  const head = document.createElement("tr");
  for (const name of names) {
    const cell = document.createElement("th"), button = document.createElement("button");
    cell.scope = "col";
    cell.className = name === "channel" ? "" : "num";
    button.type = "button";
    button.dataset.sort = name;
    button.textContent = LABELS[name];
    const arrow = document.createElement("span");
    arrow.className = "arrow";
    arrow.setAttribute("aria-hidden", "true");
    if (by === name) { cell.setAttribute("aria-sort", way > 0 ? "ascending" : "descending"); arrow.textContent = way > 0 ? "↑" : "↓"; }
    button.append(arrow);
    cell.append(button);
    head.append(cell);
  }
  const rows = index.slice(page * PAGE, (page + 1) * PAGE).map((i) => {
    const row = document.createElement("tr");
    if (i === marked) row.className = "marked";
    names.forEach((name, n) => {
      const cell = document.createElement(n ? "td" : "th");
      if (!n) cell.scope = "row";
      if (n) cell.className = "num";
      cell.textContent = n ? digits(value(name, i)) : i.toLocaleString("en");
      row.append(cell);
    });
    return row;
  });
  const focused = document.activeElement?.dataset?.sort;
  box.querySelector("thead").replaceChildren(head);
  box.querySelector("tbody").replaceChildren(...rows);
  if (focused) box.querySelector(`[data-sort="${focused}"]`)?.focus();
  box.querySelector("[role=status]").textContent = `${(page * PAGE + 1).toLocaleString("en")}–${Math.min(count, (page + 1) * PAGE).toLocaleString("en")} of ${count.toLocaleString("en")}`;
  box.querySelector('[data-page="-1"]').disabled = page === 0;
  box.querySelector('[data-page="1"]').disabled = (page + 1) * PAGE >= count;
}

box.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.sort) {
    const name = button.dataset.sort;
    order = [name, order[0] === name ? -order[1] : name === "channel" ? 1 : -1];
    page = 0;
    marked = -1;
  } else if (button?.dataset.page) {
    page += Number(button.dataset.page);
    marked = -1;
  } else return;
  showTable();
});
document.getElementById("find-channel")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const number = document.getElementById("channel-number").value;
  if (number === "") return;
  marked = Number(number);
  showTable();
});

if (section.querySelector("[data-chart]")) {
  load();
  let version = document.getElementById("version").dataset.version;
  document.addEventListener("refreshed", () => {
    const now = document.getElementById("version").dataset.version;
    if (now !== version) { version = now; load(); }
  });
}

// --- drift over time ---
const MOST = 2; // |z| that is drawn in full
const drift = document.getElementById("drift");
let driftTag = null;
const minutes = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const secondsToo = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
// With seconds where the whole history is shorter than ten minutes.
const clock = { format: (at) => (seen.history.times.at(-1) - seen.history.times[0] < 600 ? secondsToo : minutes).format(at) };
const moment = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit" });

const scoreChart = drift && new Chart(drift.querySelector('[data-drift-chart="score"]'), {
  series: [{ fill: "12%" }, { stroke: "muted", width: 1, dash: [4, 4] }],
  x: { scale: { time: true }, axis: { values: (_, ticks) => ticks.map((tick) => clock.format(tick * 1000)), space: 80 } },
  y: { scale: { range: (_, low, high) => [0, (high || 1) * 1.1] } },
  read: (data, i) => `${moment.format(data[0][i] * 1000)}  score ${digits(data[1][i])}`,
});

class Heat {
  constructor(element) {
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", "Heat map of the shift of the mean, by channel over time");
    this.labels = Object.fromEntries(["low", "high", "from", "to"].map((name) => [name, document.createElement("span")]));
    for (const [name, label] of Object.entries(this.labels)) label.className = `edge ${name}`;
    this.readout = document.createElement("output");
    this.readout.className = "readout";
    element.replaceChildren(this.canvas, ...Object.values(this.labels), this.readout);
    this.canvas.addEventListener("pointermove", (event) => this.say(event));
    this.canvas.addEventListener("pointerleave", () => (this.readout.textContent = ""));
  }

  show({ channels, history: { group, times, shifts } }) {
    Object.assign(this, { group, times, shifts, channels });
    const rows = shifts[0]?.length ?? 1;
    this.canvas.width = times.length;
    this.canvas.height = rows;
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(times.length, rows);
    const [red, green, blue] = rgb(getComputedStyle(document.documentElement).getPropertyValue("--accent").trim());
    shifts.forEach((column, x) => column.forEach((z, y) => {
      image.data.set([red, green, blue, Math.round(255 * Math.min(1, Math.abs(z) / MOST))], 4 * (y * times.length + x));
    }));
    context.putImageData(image, 0, 0);
    const { low, high, from, to } = this.labels;
    low.textContent = "0";
    high.textContent = (channels - 1).toLocaleString("en");
    from.textContent = clock.format(times[0] * 1000);
    to.textContent = times.length > 1 ? clock.format(times.at(-1) * 1000) : "";
  }

  say(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / box.width * this.canvas.width), y = Math.floor((event.clientY - box.top) / box.height * this.canvas.height);
    const z = this.shifts[x]?.[y];
    if (z === undefined) return;
    const first = y * this.group, last = Math.min(first + this.group, this.channels) - 1;
    const where = last > first ? `channels ${first.toLocaleString("en")}–${last.toLocaleString("en")}` : `channel ${first}`;
    this.readout.textContent = `${clock.format(this.times[x] * 1000)}  ${where}  z ${digits(z)}`;
  }
}

function rgb(hex) {
  return [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));
}

const heat = drift && new Heat(drift.querySelector('[data-drift-chart="heat"]'));

async function loadDrift() {
  const headers = { Accept: "application/json" };
  if (driftTag) headers["If-None-Match"] = driftTag;
  let response;
  try {
    response = await fetch(drift.dataset.drift, { headers, cache: "no-store" });
  } catch { return; } // the page itself says that it is not up to date
  if (!response.ok) return;
  driftTag = response.headers.get("ETag");
  seen = await response.json();
  drift.querySelector(".over-time").hidden = !seen.history.times.length;
  showDrift();
  showTable();
}

function showDrift() {
  const { history: { times, scores }, threshold } = seen;
  if (!times.length) return;
  // A single point has no line: it gets a short past.
  const [x, y] = times.length > 1 ? [times, scores] : [[times[0] - 5, times[0]], [scores[0], scores[0]]];
  scoreChart.show([x, y, x.map(() => threshold)]);
  heat.show(seen);
}

if (drift) {
  loadDrift();
  document.addEventListener("refreshed", loadDrift);
  document.addEventListener("theme", () => seen?.history.times.length && heat.show(seen));
}

// --- a batch before and after ---
const form = document.getElementById("batch-form"), problem = document.getElementById("batch-problem");
const result = document.getElementById("batch-result"), json = document.getElementById("json");
const file = document.getElementById("file"), drop = document.getElementById("drop"), fileName = document.getElementById("file-name");
const TYPES = { npy: "application/x-npy", safetensors: "application/vnd.safetensors", json: "application/json" };
const asJson = (text, name) => ({ body: new Blob([text.startsWith("{") ? text : `{"input": ${text}}`]), type: TYPES.json, name });
let batch = null; // {body, type, name}

const histograms = Object.fromEntries(["before", "after"].map((when) => [when, new Chart(document.querySelector(`[data-histogram=${when}]`), {
  series: [{ fill: "70%", width: 0, paths: window.uPlot.paths.bars({ size: [0.92, 100] }) }],
  x: { scale: { range: (_, low, high) => [low, high] }, axis: { values: (_, ticks) => ticks.map((tick) => (Math.abs(tick) < 1e-12 ? "0" : digits(tick))) } },
  y: { scale: { range: (_, low, high) => [0, high * 1.05 || 1] } },
  read: (data, i) => `${digits(data[0][i])}: ${data[1][i].toLocaleString("en")} values`,
})]));

async function take(chosen) {
  if (!chosen) return;
  const type = TYPES[chosen.name.split(".").at(-1).toLowerCase()];
  if (!type) return fail(`${chosen.name} is no .npy, .safetensors or .json file.`);
  if (isTooLarge(chosen)) return;
  batch = type === TYPES.json ? asJson((await chosen.text()).trim(), chosen.name) : { body: chosen, type, name: chosen.name };
  json.value = "";
  fileName.textContent = chosen.name;
  send();
}

file.addEventListener("change", () => { take(file.files[0]); file.value = ""; });
for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => { event.preventDefault(); take(event.dataTransfer.files[0]); });
json.addEventListener("input", () => { batch = null; fileName.textContent = "or drop a .npy, .safetensors or .json file here"; });

document.getElementById("sample").addEventListener("click", () => {
  const shape = form.dataset.shape.split(",").map(Number), channels = Math.max(...shape.filter((_, i) => i === placeOf(shape)), 1);
  const values = new Float64Array(shape.reduce((a, b) => a * b, 1)), inner = shape.slice(placeOf(shape) + 1).reduce((a, b) => a * b, 1);
  const usable = step === 1 && series?.mean;
  for (let i = 0; i < values.length; i++) {
    const channel = Math.floor(i / inner) % channels;
    values[i] = (usable ? series.mean.low[channel] : 0) + (usable ? series.std.low[channel] : 1) * normal();
  }
  batch = { body: npy(shape, values, form.dataset.dtype), type: TYPES.npy, name: "random values" };
  json.value = "";
  fileName.textContent = `random values of shape (${shape.join(", ")}), distributed as the layer expects`;
  send();
});

const placeOf = (shape) => { const axis = Number(form.dataset.axis); return axis < 0 ? shape.length + axis : axis; };
const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());

function npy(shape, values, dtype) {
  const numbers = dtype === "float64" ? values : new Float32Array(values);
  const head = `{'descr': '<f${numbers.BYTES_PER_ELEMENT}', 'fortran_order': False, 'shape': (${shape.join(", ")},), }`;
  const padded = head.padEnd(Math.ceil((head.length + 11) / 64) * 64 - 11) + "\n";
  return new Blob([new Uint8Array([0x93, 78, 85, 77, 80, 89, 1, 0, padded.length & 255, padded.length >> 8]), padded, numbers]);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = json.value.trim();
  if (text) batch = asJson(text, "JSON");
  if (!batch) return fail("Choose a file, paste JSON, or use random values.");
  send();
});

/** Said here, because a browser that is still sending does not read the service's answer. */
function isTooLarge({ size }) {
  const most = Number(form.dataset.maxBytes);
  if (size > most) fail(`The batch has ${size.toLocaleString("en")} bytes, and this service takes up to ${most.toLocaleString("en")}: BATCHNORM_MAX_BODY_BYTES.`);
  return size > most;
}

async function send() {
  if (isTooLarge(batch.body)) return;
  const channel = document.getElementById("batch-channel").value;
  const url = new URL(form.dataset.to, location.href);
  if (channel !== "") url.searchParams.set("channel", channel);
  const headers = { "Content-Type": batch.type, Accept: "application/json", "X-Form-Token": document.body.dataset.formToken };
  let response, document_;
  try {
    response = await fetch(url, { method: "POST", headers, body: batch.body, redirect: "manual" });
    document_ = await response.json();
  } catch {
    return fail("The service did not answer. Try again.");
  }
  if (!response.ok) return fail(document_.detail ?? document_.title);
  problem.hidden = true;
  result.hidden = false;
  const { shape, dtype, before, after, version } = document_;
  document.getElementById("batch-about").textContent = `${batch.name}, shape (${shape.join(", ")}), ${dtype}; ${channel === "" ? "all channels" : `channel ${channel}`}, version ${version.toLocaleString("en")}`;
  for (const [when, one] of Object.entries({ before, after })) {
    const missing = one.not_finite ? `, ${one.not_finite.toLocaleString("en")} not finite` : "";
    document.getElementById(`${when}-about`).textContent = one.counts.length ? `mean ${digits(one.mean)}, std ${digits(one.std)}${missing}` : missing.slice(2);
    if (!one.counts.length) { histograms[when].say_nothing(one.values ? "No finite values" : "An empty batch"); continue; }
    const middles = one.counts.map((_, i) => (one.edges[i] + one.edges[i + 1]) / 2);
    histograms[when].show([middles, one.counts]);
  }
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  result.scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
}

function fail(text) {
  problem.textContent = text;
  problem.hidden = false;
  result.hidden = true;
}
