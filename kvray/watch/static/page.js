// Asks for /data every second and draws it. Text only ever enters the page as text.
"use strict";

const PERIOD_MS = 1000;
const STALE_S = 10; // a status that is older is said to be
const SOURCES = ["device", "local", "peer", "computed"];
const NO_TOKENS = Object.fromEntries(SOURCES.map((source) => [source, 0]));
const NODE_CHARS = 8;
const MANY_NODES = 12; // from here on a node is told in a few words, and the rest by its tooltip
const CLASS_COLOURS = ["var(--device)", "var(--local)", "var(--peer)", "var(--good)", "var(--warn)"];
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function number(value) {
  return Math.round(value).toLocaleString("en");
}

function bytes(value) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 1000) return `${value < 10 && unit !== "B" ? value.toFixed(1) : Math.round(value)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(1)} TB`;
}

// A model that lies in a folder is called by the folder's name.
function shortModel(model) {
  return model.startsWith("/") ? model.split("/").filter(Boolean).at(-1) : model;
}

function bar(parts, all) {
  return make("div", { class: "bar" }, ...parts.map(([colour, value]) =>
    make("i", { style: { width: `${all ? (100 * value) / all : 0}%`, background: colour } })));
}

function drawSummary(data, history) {
  const hits = data.hit_tokens;
  const all = SOURCES.reduce((sum, source) => sum + hits[source], 0);
  const last = history.at(-1);
  const items = [
    ["nodes that serve", `${data.nodes.filter((n) => n.state === "ready").length} of ${data.nodes.length}`],
    ["engines", number(data.nodes.reduce((sum, n) => sum + n.engines, 0))],
    ["models", [...new Set(data.nodes.flatMap((n) => n.models.map(shortModel)))].join(", ") || "none"],
    ["prompt tokens", number(all)],
    ["not computed", all ? `${((100 * (all - hits.computed)) / all).toFixed(1)} %` : "–"],
    ["from peers", number(hits.peer)],
    ["fetched in the last seconds", last ? bytes(last.fetched_bytes) : "–"],
  ];
  if (data.split_models.length) {
    items.push(["engines that share nothing", `${data.split_models.map(shortModel).join(", ")}: run kvray doctor`]);
  }
  $("summary").replaceChildren(...items.map(([name, value]) =>
    make("div", { "data-total": name }, make("span", {}, name), make("b", {}, value))));
}

function count(value, noun) {
  return `${number(value)} ${noun}${value === 1 ? "" : "s"}`;
}

function nodeCard(node) {
  const parts = node.classes.map((row, index) =>
    [CLASS_COLOURS[index % CLASS_COLOURS.length], row.slot_bytes * row.occupied]);
  const share = node.slab_bytes ? Math.round((100 * node.used_bytes) / node.slab_bytes) : 0;
  const sizes = node.classes.map((row) => `${number(row.occupied)} of ${number(row.slots)} slots of ${bytes(row.slot_bytes)}`);
  const lines = [
    make("p", {}, make("span", { class: "state" }, node.state), make("b", {}, node.node.slice(0, NODE_CHARS)), ` ${node.host}`),
    bar(parts, node.slab_bytes),
    make("p", { class: "soft" }, `${share} % of ${bytes(node.slab_bytes)} in ${count(node.blocks, "block")}, ${count(node.engines, "engine")}`),
  ];
  const details = [];
  if (sizes.length) details.push(sizes.join("; "));
  if (node.models.length) details.push(node.models.map(shortModel).join(", "));
  if (node.epoch) details.push(`epoch ${node.epoch}`);
  lines.push(...details.map((line) => make("p", { class: "soft detail" }, line)));
  if (node.problem) lines.push(make("p", {}, node.problem));
  const title = [node.node, ...details, ...node.models].join("\n");
  return make("div", { class: `node ${node.state}`, "data-node": node.node, "data-state": node.state, title }, ...lines);
}

function drawNodes(nodes) {
  // Who is not well comes first; the others stay where they are.
  const sorted = nodes.toSorted((a, b) => (a.state === "ready") - (b.state === "ready"));
  $("nodes").classList.toggle("many", nodes.length > MANY_NODES);
  $("nodes").replaceChildren(...(nodes.length ? sorted.map(nodeCard) : [make("p", { class: "empty" }, "no node has been seen yet")]));
}

function drawHistory(history, pointS, totals) {
  const width = 600, height = 170, most = Math.max(1, ...history.map((p) => SOURCES.reduce((s, k) => s + p[k], 0)));
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "prompt tokens of the last hour by source");
  const step = width / Math.max(60, history.length);
  history.forEach((point, index) => {
    let top = height;
    for (const source of SOURCES) {
      const tall = (height * point[source]) / most;
      if (!tall) continue;
      const rect = document.createElementNS(SVG, "rect");
      top -= tall;
      for (const [name, value] of [["x", index * step], ["y", top], ["width", Math.max(step, 0.5)], ["height", tall]]) rect.setAttribute(name, value);
      rect.style.fill = `var(--${source})`;
      svg.append(rect);
    }
  });
  $("history").replaceChildren(svg);
  $("legend").replaceChildren(
    ...SOURCES.map((source) => make("span", { "data-source": source, "data-tokens": totals[source] },
      make("i", { style: { background: `var(--${source})` } }), `${source} ${number(totals[source])}`)),
    make("span", {}, history.length ? `highest bar: ${number(most)} tokens in ${pointS} s` : "no history yet"));
}

function drawReasons(misses) {
  const rows = Object.entries(misses).sort((a, b) => b[1] - a[1]);
  const most = Math.max(1, ...rows.map((row) => row[1]));
  if (!rows.length) {
    $("reasons").replaceChildren(make("p", { class: "empty" }, "nothing was computed yet"));
    return;
  }
  $("reasons").replaceChildren(...rows.map(([reason, tokens]) =>
    make("div", { class: "reason", "data-reason": reason, "data-tokens": tokens },
      make("span", {}, reason.replaceAll("_", " ")), bar([["var(--computed)", tokens]], most), make("b", {}, number(tokens)))));
}

function drawTraffic(traffic) {
  if (!traffic.length) {
    $("traffic").replaceChildren(make("p", { class: "empty" }, "no block is moving"));
    return;
  }
  const to = [...new Set(traffic.map((t) => t.to))].sort();
  const from = [...new Set(traffic.map((t) => t.from))].sort();
  const rate = new Map(traffic.map((t) => [`${t.to} ${t.from}`, t.bytes_per_s]));
  const most = Math.max(...rate.values());
  const head = make("tr", {}, make("th", {}, "to ↓ from →"), ...from.map((f) => make("th", {}, f.slice(0, NODE_CHARS))));
  const rows = to.map((t) => make("tr", {}, make("th", {}, t.slice(0, NODE_CHARS)), ...from.map((f) => {
    const value = rate.get(`${t} ${f}`) || 0;
    const shade = `color-mix(in srgb, var(--peer) ${Math.round((70 * value) / most)}%, transparent)`;
    return make("td", { style: { background: shade } }, value ? `${bytes(value)}/s` : "");
  })));
  $("traffic").replaceChildren(make("table", {}, head, ...rows));
}

function drawEvents(events) {
  if (!events.length) return;
  $("events").replaceChildren(...events.toReversed().map((event) =>
    make("li", {}, make("time", {}, new Date(1000 * event.at_s).toLocaleTimeString()),
      `${event.node ? `node ${event.node.slice(0, NODE_CHARS)} ` : ""}${event.text}`)));
}

function say(text, isBad) {
  $("state").textContent = text;
  $("state").classList.toggle("bad", isBad);
}

function draw(feed) {
  $("state").dataset.atS = feed.at_s;
  const data = feed.latest;
  if (feed.silence) say(feed.silence, true);
  else if (!data) say("waiting for the first status", false);
  else {
    const age = Date.now() / 1000 - feed.at_s;
    say(age > STALE_S ? `the last status is ${Math.round(age)} s old` : "live", age > STALE_S);
  }
  drawEvents(feed.events);
  drawHistory(feed.history, feed.point_s, data ? data.hit_tokens : NO_TOKENS);
  if (!data) return;
  $("cluster").textContent = data.cluster;
  drawSummary(data, feed.history);
  drawNodes(data.nodes);
  drawReasons(data.miss_tokens);
  drawTraffic(feed.traffic);
}

async function look() {
  try {
    const answer = await fetch("data", { cache: "no-store" });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    draw(await answer.json());
  } catch (error) {
    say(`the page's server does not answer: ${error.message}`, true);
  }
  setTimeout(look, PERIOD_MS);
}

look();
