"use strict";
// Every text goes in as text, never as markup: names come from engines.
const EVERY_MILLISECONDS = 1000;
const HISTORY_LENGTH = 90;
const history = new Map();

const none = "–";
const number = (value, digits = 0) => value === null ? none
  : value.toLocaleString("en", {minimumFractionDigits: digits, maximumFractionDigits: digits});
const percent = (value, digits = 0) => value === null ? none : number(100 * value, digits) + " %";
const clock = (mhz) => mhz === null ? none : mhz === 0 ? "default" : number(mhz) + " MHz";
const seconds = (value) => value === null ? none
  : Math.abs(value) < 1 ? number(1000 * value) + " ms" : number(value, 1) + " s";
const words = (text) => text.replaceAll("_", " ");

function span(value) {
  const minutes = Math.floor(value / 60);
  if (minutes < 1) return number(value) + " s";
  if (minutes < 120) return minutes + " min";
  return number(minutes / 60, 1) + " h";
}

function element(name, text, style) {
  const made = document.createElement(name);
  if (text instanceof Node) made.append(text); else made.textContent = text;
  if (style) made.className = style;
  return made;
}

function sparkline(values) {
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg");
  picture.setAttribute("viewBox", `0 0 ${HISTORY_LENGTH - 1} 20`);
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(space, "polyline");
  const most = Math.max(...values, 1);
  const start = HISTORY_LENGTH - values.length;
  line.setAttribute("points", values.map((value, i) => `${start + i},${19 - 18 * value / most}`).join(" "));
  picture.append(line);
  return picture;
}

function fill(id, columns, rows, empty) {
  const head = element("tr", "");
  for (const [title, , style] of columns) head.append(element("th", title, style));
  const body = rows.map((row) => {
    const line = element("tr", "");
    for (const [, value, style] of columns) {
      const [text, more] = [value(row)].flat();
      line.append(element("td", text, [style, more].filter(Boolean).join(" ")));
    }
    return line;
  });
  if (!body.length) {
    const cell = element("td", empty, "soft");
    cell.colSpan = columns.length;
    const line = element("tr", "");
    line.append(cell);
    body.push(line);
  }
  document.getElementById(id).replaceChildren(head, ...body);
}

const STATES = {throttled: "good", left_throttled: "bad", unknown: "bad", default: "soft"};
const READ_BACK = {converged: "good", capped: "warn", drifted: "bad", unknown: "bad"};
const GPU_COLUMNS = [
  ["GPU", (gpu) => gpu.uuid, "name"],
  ["Model", (gpu) => gpu.name],
  ["State", (gpu) => [words(gpu.state), STATES[gpu.state]]],
  ["Target", (gpu) => clock(gpu.target_mhz), "number"],
  ["Read back", (gpu) => [words(gpu.clock_state), READ_BACK[gpu.clock_state] ?? "soft"]],
  ["Runs at", (gpu) => gpu.observed_mhz === null ? none : number(gpu.observed_mhz) + " MHz", "number"],
  ["Clock, last minutes", (gpu) => sparkline(history.get(gpu.uuid))],
  ["Power", (gpu) => gpu.power_watts === null ? none : number(gpu.power_watts) + " W", "number"],
  ["Engine", (gpu) => gpu.engine || none, "name"],
];
const ENGINE_COLUMNS = [
  ["Engine", (engine) => engine.id, "name"],
  ["Mode", (engine) => engine.mode],
  ["Chosen clock", (engine) => clock(engine.target_mhz), "number"],
  ["Why", (engine) => words(engine.reason) || none],
  ["Slack", (engine) => [seconds(engine.slack_seconds), engine.slack_seconds < 0 ? "bad" : ""], "number"],
  ["Limit", (engine) => engine.slo || none],
  ["Predicted saving", (engine) => percent(engine.predicted_saving_ratio), "number"],
  ["Within bound", (engine) => [percent(engine.coverage_ratio, 1),
    engine.coverage_ratio !== null && engine.coverage_ratio < 0.9 ? "warn" : ""], "number"],
  ["Prediction error", (engine) => percent(engine.prediction_error_ratio, 1), "number"],
  ["Last state", (engine) => seconds(engine.state_age_seconds), "number"],
  ["Bundle", (engine) => engine.bundle || none, "name"],
];
const CHANGE_COLUMNS = [
  ["When", (change) => new Date(1000 * change.unix_seconds).toLocaleTimeString("en-GB")],
  ["Engine", (change) => change.engine, "name"],
  ["From", (change) => clock(change.from_mhz), "number"],
  ["To", (change) => clock(change.to_mhz), "number"],
  ["Why", (change) => words(change.reason)],
];

function show(status) {
  document.getElementById("badge").hidden = !status.simulated;
  document.getElementById("about").textContent = `${status.version}, up ${span(status.uptime_seconds)}`;
  const problem = document.getElementById("problem");
  problem.hidden = !status.reload_problem;
  problem.textContent = status.reload_problem
    ? `The last reload was refused; what was before is in force. ${status.reload_problem}` : "";
  for (const gpu of status.gpus) {
    const values = history.get(gpu.uuid) ?? [];
    values.push(gpu.observed_mhz ?? 0);
    history.set(gpu.uuid, values.slice(-HISTORY_LENGTH));
  }
  const slacks = status.engines.map((engine) => engine.slack_seconds).filter((slack) => slack !== null);
  const watts = status.gpus.reduce((sum, gpu) => sum + (gpu.power_watts ?? 0), 0);
  const whole = status.predicted_default_energy_joules;
  const totals = [
    ["Engines", number(status.engines.length)],
    ["GPUs throttled", `${status.gpus.filter((gpu) => gpu.state === "throttled").length} of ${status.gpus.length}`],
    ["Power now", number(watts) + " W"],
    ["Predicted saving", whole > 0 ? percent(1 - status.predicted_energy_joules / whole, 1) : none],
    ["Least slack", slacks.length ? seconds(Math.min(...slacks)) : none],
    ["Requests beyond saving", number(status.engines.reduce((sum, engine) => sum + engine.lost_requests_count, 0))],
  ];
  document.getElementById("totals").replaceChildren(...totals.map(([name, value]) => {
    const box = element("div", "");
    box.append(element("dt", name), element("dd", value));
    return box;
  }));
  fill("gpus", GPU_COLUMNS, status.gpus, "No GPU is configured.");
  fill("engines", ENGINE_COLUMNS, status.engines, "No engine is connected.");
  fill("changes", CHANGE_COLUMNS, status.changes, "None yet.");
}

async function poll() {
  const live = document.getElementById("live");
  try {
    const answer = await fetch("status.json", {cache: "no-store"});
    if (!answer.ok) throw new Error(answer.statusText);
    show(await answer.json());
    live.textContent = "live";
    live.className = "ok";
  } catch {
    live.textContent = "no answer: what you see is old";
    live.className = "lost";
  }
  setTimeout(poll, EVERY_MILLISECONDS);
}

poll();
