const at = Object.fromEntries(data.numbers.map((name, i) => [name, i]));
const textAt = Object.fromEntries(data.texts.map((name, i) => [name, data.numbers.length + i]));
const CORRECT = data.numbers.length + data.texts.length, TOKENS = CORRECT + 1, HEIGHT = 28;
const rows = data.rows, strings = data.strings;
const number = (row, name) => row[at[name]];
const sampled = row => Math.max(1, number(row, "sampled") ?? number(row, "length"));  // tokens; earlier versions wrote only all
const text = (row, name) => row[textAt[name]] == null ? null : strings[row[textAt[name]]];
const $ = id => document.getElementById(id);
const lower = strings.map(s => s.toLowerCase());
const mode = t => t === 0 ? "greedy" : "T=" + t;
const nameSeries = (suite, temperature, thinking) => (suite ?? "training") + ", " + mode(temperature)
  + (thinking == null ? "" : ", " + thinking + " thinking tokens");
const seriesOf = row => nameSeries(text(row, "suite"), number(row, "temperature"), number(row, "thinking_tokens"));
// A problem over the run. Several may have the same question: a suite numbers them, a data
// set names them; those that it does not name are the same if question and answer are.
const problemIn = (suite, index) => "suite|" + suite + "|" + index;
const problemOf = row => text(row, "suite") != null ? problemIn(text(row, "suite"), number(row, "problem"))
  : text(row, "task") ? "task|" + text(row, "task") : "text|" + row[textAt.question] + "|" + row[textAt.answer];
const groupOf = row => [number(row, "step"), text(row, "phase"), seriesOf(row), number(row, "problem")].join("|");
// In an address: positions differ between pages of one run, made with other limits.
const keyOf = i => groupOf(rows[i]) + "|" + number(rows[i], "attempt");
const groups = new Map(), byProblem = new Map(), tested = new Map(), evaluated = new Map();
const put = (map, key, i) => map.has(key) ? map.get(key).push(i) : map.set(key, [i]);
rows.forEach((row, i) => {
  put(groups, groupOf(row), i);
  put(byProblem, problemOf(row), i);
  if (text(row, "suite") != null) put(tested, [seriesOf(row), number(row, "step"), number(row, "problem")].join("|"), i);
});
for (const e of data.evaluations) {
  e.series = nameSeries(e.suite, e.temperature, e.thinking_tokens);
  evaluated.set(e.series + "|" + e.step, e);
}
const countOf = (e, j) => ({right: [...e.verdicts.slice(j * e.samples, (j + 1) * e.samples)].filter(v => v === "1").length, count: e.samples});
const FILTERS = ["search", "suite", "phase", "from", "to", "problem", "verdict", "least", "most", "stop", "shortest", "longest", "sort"];
const PAIR = ["series", "before", "after", "change"], FIELDS = [...FILTERS, ...PAIR];
const SEARCHED = ["text", "question", "answer", "parsed", "reason", "suite", "task"].map(name => textAt[name]);
// `selected` is a row; `changed` a problem of two evaluations, whose rows may be missing;
// `whole` has what was unfolded.
let state = {view: "rollouts", selected: null, changed: null, colour: "none", follow: null, whole: new Set()}, found = [], restoring = false;

function options(select, values, any) {
  select.replaceChildren(...(any ? [element("option", {value: ""}, any)] : []),
    ...values.map(v => element("option", {value: v}, visible(start(String(v), 100)))));
}
const distinct = values => [...new Set(values)];
options($("suite"), distinct(rows.map(seriesOf)), "all");
options($("phase"), distinct(rows.map(r => text(r, "phase") ?? "")), "all");
options($("stop"), distinct(rows.map(r => text(r, "stop") ?? "")), "any");
options($("series"), distinct([...data.evaluations.map(e => e.series), ...rows.filter(r => text(r, "suite") != null).map(seriesOf)]), "");

function filtered() {
  const value = Object.fromEntries(FIELDS.map(id => [id, $(id).value]));
  const words = value.search.toLowerCase();
  const hits = words ? new Set(lower.flatMap((s, i) => s.includes(words) ? [i] : [])) : null;
  const low = (id, x) => value[id] === "" || x != null && x >= Number(value[id]);
  const high = (id, x) => value[id] === "" || x != null && x <= Number(value[id]);
  const kept = [];
  const candidates = state.follow == null ? rows.keys() : byProblem.get(state.follow) ?? [];
  for (const i of candidates) {
    const row = rows[i];
    if (value.suite && seriesOf(row) !== value.suite) continue;
    if (value.phase && text(row, "phase") !== value.phase) continue;
    if (value.stop && text(row, "stop") !== value.stop) continue;
    if (!low("from", number(row, "step")) || !high("to", number(row, "step"))) continue;
    if (value.problem !== "" && number(row, "problem") !== Number(value.problem)) continue;
    if (!low("shortest", number(row, "length")) || !high("longest", number(row, "length"))) continue;
    if (value.verdict === "right" && !row[CORRECT] || value.verdict === "wrong" && row[CORRECT]) continue;
    if (!low("least", number(row, "reward")) || !high("most", number(row, "reward"))) continue;
    if (value.verdict === "none" && row[textAt.parsed] != null) continue;
    if (hits && !SEARCHED.some(column => hits.has(row[column])) && (row[CORRECT] ? "correct" : "wrong") !== words) continue;
    kept.push(i);
  }
  const by = {length: i => -number(rows[i], "length"), reward: i => -number(rows[i], "reward"),
    logp: i => (number(rows[i], "logp_sum") ?? -1e300) / sampled(rows[i])}[value.sort];  // null: not finite
  return by ? kept.sort((a, b) => by(a) - by(b)) : kept;
}

// The outcome of each problem of a series at a step: from the verdicts of the summary,
// which has all, or from the rollouts where there is none.
function outcomes(series, step) {
  const made = new Map(), e = evaluated.get(series + "|" + step);
  for (let j = 0; e && j < e.verdicts.length / e.samples; j++) {
    made.set(j, {...countOf(e, j), first: tested.get([series, step, j].join("|"))?.[0] ?? null});
  }
  if (e) return made;
  rows.forEach((row, i) => {
    if (text(row, "suite") == null || seriesOf(row) !== series || number(row, "step") !== step) return;
    const entry = made.get(number(row, "problem")) ?? {right: 0, count: 0, first: i};
    entry.right += row[CORRECT]; entry.count += 1; made.set(number(row, "problem"), entry);
  });
  return made;
}

function changes() {
  const series = $("series").value, made = [];
  const a = outcomes(series, Number($("before").value)), b = outcomes(series, Number($("after").value));
  for (const [problem, now] of b) {
    const then = a.get(problem);
    if (!then) continue;
    const difference = now.right / now.count - then.right / then.count;
    const kind = difference > 0 ? "learned" : difference < 0 ? "lost" : "";
    if (!$("change").value || $("change").value === kind) made.push({row: now.first ?? then.first, problem, then, now, kind});
  }
  return made;
}

function said() {
  if (state.view === "rollouts") return `${found.length.toLocaleString()} of ${rows.length.toLocaleString()} rollouts`
    + (state.follow == null ? "" : "; following one problem over the run");
  if ($("series").value === "") return "learned and lost need two evaluations of a suite; this folder has none";
  if ($("before").value === $("after").value) return "learned and lost need two evaluations of a suite: choose two steps";
  const learned = found.filter(f => f.kind === "learned").length, lost = found.filter(f => f.kind === "lost").length;
  const lacking = found.filter(f => f.now.first == null || f.then.first == null).length;
  return `${found.length.toLocaleString()} problems in both evaluations shown: ${learned} learned, ${lost} lost`
    + (lacking ? `; the attempts at ${lacking} of them are not all in the file` : "");
}

function redraw() {
  const rollouts = state.view === "rollouts";
  $("tab-rollouts").setAttribute("aria-pressed", rollouts);
  $("tab-changes").setAttribute("aria-pressed", !rollouts);
  $("changes").hidden = rollouts;
  $("filters").hidden = !rollouts;
  found = rollouts ? filtered().map(i => ({row: i})) : changes();
  $("count").textContent = said();
  $("first-column").textContent = rollouts ? "step · problem.attempt · suite" : "problem";
  $("last-column").textContent = rollouts ? "tokens" : "correct";
  $("space").style.height = found.length * HEIGHT + "px";
  draw();
  detail();
  if (!restoring) remember();
}

function draw() {
  const top = $("list").scrollTop, first = Math.max(0, Math.floor(top / HEIGHT) - 8);
  const last = Math.min(found.length, first + Math.ceil(($("list").clientHeight || 600) / HEIGHT) + 16);
  $("shown").style.top = first * HEIGHT + "px";
  $("shown").replaceChildren(...found.slice(first, last).map((entry, k) => listed(entry, first + k)));
  const active = found.findIndex(isSelected);
  if (active >= first && active < last) $("list").setAttribute("aria-activedescendant", "row-" + active);
  else $("list").removeAttribute("aria-activedescendant");
}

const isSelected = entry => entry.then ? entry.problem === state.changed : entry.row === state.selected;

function listed(entry, k) {
  const row = rows[entry.row], right = entry.then ? entry.kind === "learned" : row[CORRECT];
  const where = entry.then ? `problem ${entry.problem}`
    : `${number(row, "step")} · ${number(row, "problem")}.${number(row, "attempt")} · ${text(row, "suite") == null ? text(row, "phase") : seriesOf(row)}`;
  const mark = entry.then ? {learned: "+", lost: "−", "": "="}[entry.kind] : right ? "✓" : "✗";
  const question = row ? start(text(row, "question") ?? "", 200).replace(/\s+/g, " ") : "(not in the file)";
  return element("div", {class: "row", role: "option", id: "row-" + k, "aria-posinset": k + 1, "aria-setsize": found.length,
    "aria-selected": String(isSelected(entry)), onclick: () => select(entry)},
  element("span", {class: "mark " + (right ? "right" : entry.kind === "" ? "same" : "wrong"), role: "img",
    "aria-label": entry.then ? entry.kind || "same" : right ? "correct" : "wrong"}, mark),
  element("span", {class: "where", title: visible(start(where, 100))}, visible(start(where, 100))),
  element("span", {class: "what" + (row ? "" : " facts")}, visible(question)),
  element("span", {class: "facts"}, entry.then ? `${entry.then.right}/${entry.then.count} → ${entry.now.right}/${entry.now.count}`
    : String(number(row, "length"))));
}

function select(entry) {
  state.selected = entry.row;
  state.changed = entry.problem ?? null;
  state.whole.clear();
  draw();
  detail();
  remember();
}

function move(by) {
  if (!found.length) return;
  const now = found.findIndex(isSelected), next = Math.min(found.length - 1, Math.max(0, now < 0 ? 0 : now + by));
  const top = next * HEIGHT, list = $("list");
  if (top < list.scrollTop || top + HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top - list.clientHeight / 2;
  select(found[next]);
}

function follow() {
  if (!rows[state.selected]) return;
  const problem = problemOf(rows[state.selected]);
  state.follow = state.follow === problem ? null : problem;
  state.view = "rollouts";
  $("list").scrollTop = 0;
  redraw();
}

function remember() {
  const kept = new URLSearchParams();
  for (const id of FIELDS) if ($(id).value !== "" && (state.view === "changes" || !PAIR.includes(id))) kept.set(id, $(id).value);
  for (const name of ["view", "colour"]) if (state[name] !== {view: "rollouts", colour: "none"}[name]) kept.set(name, state[name]);
  if (state.view === "changes" && state.changed != null) kept.set("changed", state.changed);
  if (state.selected != null) kept.set("selected", keyOf(state.selected));
  if (state.follow != null) kept.set("follow", keyOf(byProblem.get(state.follow)[0]));
  history.replaceState(null, "", "#" + kept);
}

function set(id, value) {
  if ($(id).tagName !== "SELECT" || [...$(id).options].some(o => o.value === value)) $(id).value = value;
  else if ([...$(id).options].some(o => o.value === "")) $(id).value = "";
}

function restore() {
  restoring = true;
  const kept = new URLSearchParams(location.hash.slice(1));
  steps(kept.get("series"));
  for (const id of FIELDS) if (!["series", "before", "after"].includes(id)) set(id, kept.get(id) ?? "");
  for (const id of ["before", "after"]) if (kept.has(id)) set(id, kept.get(id));
  const index = name => kept.has(name) ? rows.findIndex((row, i) => keyOf(i) === kept.get(name)) : -1;
  const selected = index("selected"), followed = index("follow");
  state = {view: kept.get("view") === "changes" ? "changes" : "rollouts", colour: COLOURS.includes(kept.get("colour")) ? kept.get("colour") : "none",
    selected: selected < 0 ? null : selected, follow: followed < 0 ? null : problemOf(rows[followed]),
    changed: kept.has("changed") ? Number(kept.get("changed")) : null, whole: new Set()};
  redraw();
  restoring = false;
}

function steps(series) {
  if (series && [...$("series").options].some(o => o.value === series)) $("series").value = series;
  const here = distinct([...data.evaluations.filter(e => e.series === $("series").value).map(e => e.step),
    ...rows.filter(r => text(r, "suite") != null && seriesOf(r) === $("series").value).map(r => number(r, "step"))]).sort((a, b) => a - b);
  for (const id of ["before", "after"]) options($(id), here, "");
  if (here.length) { $("before").value = here[0]; $("after").value = here[here.length - 1]; }
}

let waiting = null;
$("filters").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => { $("list").scrollTop = 0; redraw(); }, 120); });
$("filters").addEventListener("submit", event => event.preventDefault());
$("changes").addEventListener("input", event => { if (event.target.id === "series") steps($("series").value); redraw(); });
$("clear").addEventListener("click", () => { for (const id of FILTERS) $(id).value = ""; state.follow = null; redraw(); });
$("tab-rollouts").addEventListener("click", () => { state.view = "rollouts"; redraw(); });
$("tab-changes").addEventListener("click", () => { state.view = "changes"; redraw(); });
function help() { $("help").hidden = !$("help").hidden; $("help-button").setAttribute("aria-expanded", !$("help").hidden); }
$("help-button").addEventListener("click", help);
$("list").addEventListener("scroll", draw);
$("detail").addEventListener("keydown", moveToken);
$("detail").addEventListener("mouseover", hoverToken);
window.addEventListener("resize", draw);
window.addEventListener("hashchange", restore);
document.addEventListener("keydown", event => {
  if (event.key === "Escape") { document.activeElement.blur(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) return;
  const key = {j: () => move(1), k: () => move(-1), ArrowDown: () => move(1), ArrowUp: () => move(-1), f: follow, "?": help,
    "/": () => { if (state.view !== "rollouts") { state.view = "rollouts"; redraw(); } $("search").focus(); }, c: () => { state.colour = COLOURS[(COLOURS.indexOf(state.colour) + 1) % COLOURS.length]; detail(); remember(); },
    t: () => { ($("tokens-" + state.selected) ?? $("detail").querySelector(".tokens"))?.focus(); }}[event.key];
  if (key) { event.preventDefault(); key(); }
});
restore();
