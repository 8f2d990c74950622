// Charts in the page's colours, by uPlot (MIT), which `uplot.js` is.

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const FONT = "12px Inter, system-ui, sans-serif";
const charts = new Set();

export function digits(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e5 || size < 1e-3 ? value.toExponential(2) : value.toPrecision(4).replace(/\.?0+$/, "");
  return text.replace("-", "−").replace("e+", "e");
}

const axis = (side) => ({
  stroke: () => colour("muted"), font: FONT, size: side ? 52 : 28, gap: 4,
  grid: { stroke: () => colour("line"), width: 1, show: Boolean(side) }, ticks: { show: false }, border: { show: false },
  ...(side ? { values: (_, ticks) => ticks.map((tick) => (Math.abs(tick) < 1e-12 ? "0" : digits(tick))), space: 40 } : {}),
});

/** A chart that fills its element and follows its width and the theme.
 *
 * `series`: {label, stroke: a colour's name, fill, width, paths, ...}; `read(chart, index)` is what is said of a place.
 */
export class Chart {
  constructor(element, { dense = false, series, bands = [], x = {}, y = {}, read, sync, options = {} }) {
    this.element = element;
    this.make = (data) => new window.uPlot({
      width: element.clientWidth, height: element.clientHeight, legend: { show: false }, padding: [6, 6, 0, 0],
      cursor: { drag: { x: true, y: false }, points: { size: 6 }, y: false, ...(sync ? { sync: { key: sync } } : {}) },
      scales: { x: { time: false, ...x.scale }, y: { ...y.scale } },
      axes: [{ ...axis(0), ...x.axis }, { ...axis(1), ...y.axis }],
      series: [{}, ...series.map((one) => ({
        width: dense ? 1 : 1.5, points: { show: false }, ...one,
        stroke: () => colour(one.stroke ?? "accent"),
        ...(one.fill ? { fill: () => `color-mix(in srgb, ${colour(one.stroke ?? "accent")} ${one.fill}, transparent)` } : {}),
      }))],
      bands: bands.map(({ series: pair }) => ({ series: pair, fill: () => `color-mix(in srgb, ${colour("accent")} 18%, transparent)` })),
      hooks: { setCursor: [(chart) => this.say(read && chart.cursor.idx !== null && chart.cursor.left >= 0 ? read(chart.data, chart.cursor.idx) : "")] },
      ...options,
    }, data, element);
    this.readout = document.createElement("output");
    this.readout.className = "readout";
    new ResizeObserver(() => this.plot?.setSize({ width: element.clientWidth, height: element.clientHeight })).observe(element);
    charts.add(this);
  }

  say(text) { if (this.readout.textContent !== text) this.readout.textContent = text; }

  /** Shows data; where the reader had zoomed in, the part that is seen stays. */
  show(data) {
    if (!this.plot) {
      this.element.replaceChildren();
      this.plot = this.make(data);
      this.element.append(this.readout);
      return;
    }
    const { min, max } = this.plot.scales.x, all = this.plot.data[0];
    const zoomed = min > all[0] || max < all.at(-1);
    this.plot.setData(data, !zoomed);
    if (zoomed) this.plot.setScale("x", { min, max });
  }

  say_nothing(text) {
    this.plot?.destroy();
    this.plot = null;
    const note = document.createElement("p");
    note.className = "no-data";
    note.textContent = text;
    this.element.replaceChildren(note);
  }
}

document.addEventListener("theme", () => { for (const { plot } of charts) plot?.redraw(false, true); });
