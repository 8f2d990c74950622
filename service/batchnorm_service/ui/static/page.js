// What every page does: keeps itself up to date in place, opens dialogs, copies code, shows times as ages.

const POLL = 1000 * (document.querySelector("[data-poll]")?.dataset.poll ?? 5), SLOWEST = 60000;
const body = document.body;

// --- ages of times ---
const UNITS = [["year", 31557600], ["month", 2629800], ["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]];
const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto", style: "short" });

function age(moment) {
  const seconds = (Date.parse(moment) - Date.now()) / 1000;
  if (seconds > -3) return "just now";
  const [unit, length] = UNITS.find(([, length]) => -seconds >= length);
  return relative.format(Math.round(seconds / length), unit);
}

function showAges() {
  for (const time of document.querySelectorAll("time[datetime]")) {
    const text = age(time.dateTime);
    if (time.textContent !== text) time.textContent = text;
  }
}
showAges();
setInterval(showAges, 10000);

// --- the page again, in place ---
// Changes only what differs, so that focus, selection, scroll positions and charts stay as they are.
function morph(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) return old.replaceWith(fresh.cloneNode(true));
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  if (old.nodeName === "TIME") return; // its text is an age
  const named = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  let place = old.firstChild;
  for (const child of [...fresh.childNodes]) {
    const known = child.id ? named.get(child.id) : undefined;
    if (known && known !== place) old.insertBefore(known, place), (place = known);
    if (place && !(child.id && !known) && !(place.id && place.id !== child.id)) {
      const next = place.nextSibling;
      morph(place, child);
      place = next;
    } else old.insertBefore(child.cloneNode(true), place);
  }
  while (place) { const next = place.nextSibling; place.remove(); place = next; }
}

let tag = null, wait = POLL, timer = 0;
const late = document.getElementById("late");

async function refresh() {
  const headers = { Accept: "text/html" };
  if (tag) headers["If-None-Match"] = tag;
  let response;
  try {
    response = await fetch(location.href, { headers, redirect: "manual", cache: "no-store", signal: AbortSignal.timeout(20000) });
  } catch {
    return fallBehind("Reconnecting");
  }
  if (response.type === "opaqueredirect") return location.reload(); // the login is over
  if (response.status === 404) return location.reload(); // the layer was deleted: the page says so
  if (!response.ok && response.status !== 304) return fallBehind(`Not up to date (${response.status})`);
  late.hidden = true;
  wait = POLL;
  if (response.status !== 304) await update(response);
  document.dispatchEvent(new CustomEvent("refreshed"));
}

async function update(response) {
  tag = response.headers.get("ETag");
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const other = fresh.getElementById(part.id);
    if (other) morph(part, other);
  }
  showAges();
}

function fallBehind(text) {
  late.textContent = text;
  late.hidden = false;
  wait = Math.min(2 * wait, SLOWEST);
}

function schedule(milliseconds) {
  clearTimeout(timer);
  timer = setTimeout(async () => {
    if (!document.hidden && !document.querySelector("dialog[open]")) await refresh();
    schedule(document.hidden ? SLOWEST : wait);
  }, milliseconds);
}

if (document.querySelector("[data-live]")) {
  schedule(POLL);
  document.addEventListener("visibilitychange", () => document.hidden || schedule(0));
  window.addEventListener("pageshow", (event) => event.persisted && schedule(0));
}
// For tests, and for whoever does not want to wait.
document.addEventListener("refresh", () => schedule(0));

// --- a message of what was done is shown once ---
const url = new URL(location.href);
if (url.searchParams.has("done")) {
  url.searchParams.delete("done");
  history.replaceState(null, "", url);
}

// --- dialogs, copying, buttons that work once ---
function openDialog(opener) {
  const dialog = document.getElementById(opener.dataset.open);
  for (const [name, value] of Object.entries(opener.dataset)) {
    for (const field of dialog.querySelectorAll(`[data-fill="${name}"]`)) field.value = value;
    for (const text of dialog.querySelectorAll(`[data-show="${name}"]`)) text.textContent = value;
  }
  const version = opener.dataset.version;
  for (const each of dialog.querySelectorAll("[data-if-version]")) each.hidden = !version;
  for (const each of dialog.querySelectorAll("[data-unless-version]")) each.hidden = Boolean(version);
  // The same key if the form is sent twice: the second changes nothing.
  const key = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  for (const field of dialog.querySelectorAll("[data-key]")) field.value = `page-${key}`;
  delete dialog.querySelector("form").dataset.sent;
  dialog.showModal();
}

async function copy(button) {
  const code = button.closest(".code").querySelector("code");
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
  } catch { // only pages by HTTPS or of this machine may
    getSelection().selectAllChildren(code);
    button.textContent = "Selected";
  }
  setTimeout(() => (button.textContent = "Copy"), 2000);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.open) openDialog(button);
  if ("close" in button.dataset) button.closest("dialog").close();
  if ("copy" in button.dataset) copy(button);
});
document.addEventListener("submit", (event) => {
  if (event.target.closest("dialog")) { // a second click would delete a pin that the first has deleted
    if ("sent" in event.target.dataset) event.preventDefault();
    event.target.dataset.sent = "";
  }
  const button = event.target.querySelector("[data-once]");
  if (button) { button.textContent = button.dataset.once; button.disabled = true; }
});

// --- keyboard: / goes to the search ---
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, dialog")) return;
  const field = document.querySelector(`[data-hotkey="${CSS.escape(event.key)}"]`);
  if (field) { event.preventDefault(); field.focus(); field.select(); }
});

// --- the section that is read, in the tabs ---
const tabs = [...document.querySelectorAll(".tabs a")];
if (tabs.length) {
  const sections = tabs.map((tab) => document.querySelector(tab.hash)).filter(Boolean);
  const mark = () => {
    const end = window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 4;
    const read = end ? sections.at(-1) : sections.findLast((section) => section.getBoundingClientRect().top < 160) ?? sections[0];
    for (const tab of tabs) tab.hash === `#${read.id}` ? tab.setAttribute("aria-current", "true") : tab.removeAttribute("aria-current");
  };
  document.addEventListener("scroll", mark, { passive: true });
  mark();
}

// --- theme: the system's, light, dark ---
const themes = ["system", "light", "dark"], names = { system: "as the system", light: "light", dark: "dark" };
const themeButton = document.getElementById("theme");
function showTheme(theme) {
  themeButton.title = `Theme: ${names[theme]}`;
  themeButton.setAttribute("aria-label", themeButton.title);
  themeButton.hidden = false;
}
themeButton.addEventListener("click", () => {
  const theme = themes[(themes.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % 3];
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("theme", theme); } catch { /* only for this page then */ }
  showTheme(theme);
  document.dispatchEvent(new CustomEvent("theme"));
});
showTheme(document.documentElement.dataset.theme ?? "system");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new CustomEvent("theme")));

// --- examples name the address that the reader used, also behind a proxy that ends TLS or puts a folder before ---
const named = new RegExp(`https?://${location.host.replace(/\W/g, "\\$&")}(?![\\w.:-])(?:${new URL(`${body.dataset.base}/..`, location.href).pathname.slice(0, -1)}(?=[/"]))?`, "g");
const used = new URL(`${body.dataset.base}/..`, location.href).href.replace(/\/$/, "");
function nameAddress() {
  for (const code of document.querySelectorAll(".code code")) {
    const text = code.textContent.replace(named, used);
    if (text !== code.textContent) code.textContent = text;
  }
}
nameAddress();
document.addEventListener("refreshed", nameAddress);

// --- a search that was not finished goes on by itself ---
document.querySelector("[data-continue]")?.click();
