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
const seriesOf = row => (text(row, "suite") ?? "training") + ", " + mode(number(row, "temperature"))
  + (number(row, "thinking_tokens") == null ? "" : ", " + number(row, "thinking_tokens") + " thinking tokens");
const groupOf = row => [number(row, "step"), text(row, "phase"), seriesOf(row), number(row, "problem")].join("|");
// In an address: positions differ between pages of one run, made with other limits.
const keyOf = i => groupOf(rows[i]) + "|" + number(rows[i], "attempt");
const groups = new Map(), byQuestion = new Map();
rows.forEach((row, i) => {
  const key = groupOf(row), question = row[textAt.question];
  groups.has(key) ? groups.get(key).push(i) : groups.set(key, [i]);
  byQuestion.has(question) ? byQuestion.get(question).push(i) : byQuestion.set(question, [i]);
});
const COLOURS = ["none", "log-prob", "reward", "author"];
const FIELDS = ["search", "suite", "phase", "from", "to", "problem", "verdict", "stop", "shortest", "longest", "sort",
  "series", "before", "after", "change"];
let state = {view: "rollouts", selected: null, colour: "none", follow: null}, found = [], restoring = false;

function options(select, values, any) {
  select.replaceChildren(...(any ? [element("option", {value: ""}, any)] : []),
    ...values.map(v => element("option", {value: v}, visible(String(v)))));
}
const distinct = values => [...new Set(values)];
options($("suite"), distinct(rows.map(seriesOf)), "all");
options($("phase"), distinct(rows.map(r => text(r, "phase") ?? "")), "all");
options($("stop"), distinct(rows.map(r => text(r, "stop") ?? "")), "any");
options($("series"), distinct(rows.filter(r => text(r, "suite") != null).map(seriesOf)), "");

function filtered() {
  const value = Object.fromEntries(FIELDS.map(id => [id, $(id).value]));
  const words = value.search.toLowerCase();
  const hits = words ? new Set(lower.flatMap((s, i) => s.includes(words) ? [i] : [])) : null;
  const low = (id, x) => value[id] === "" || x >= Number(value[id]), high = (id, x) => value[id] === "" || x <= Number(value[id]);
  const kept = [];
  const candidates = state.follow == null ? rows.keys() : byQuestion.get(state.follow) ?? [];
  for (const i of candidates) {
    const row = rows[i];
    if (value.suite && seriesOf(row) !== value.suite) continue;
    if (value.phase && text(row, "phase") !== value.phase) continue;
    if (value.stop && text(row, "stop") !== value.stop) continue;
    if (!low("from", number(row, "step")) || !high("to", number(row, "step"))) continue;
    if (value.problem !== "" && number(row, "problem") !== Number(value.problem)) continue;
    if (!low("shortest", number(row, "length")) || !high("longest", number(row, "length"))) continue;
    if (value.verdict === "right" && !row[CORRECT] || value.verdict === "wrong" && row[CORRECT]) continue;
    if (value.verdict === "paid" && !(number(row, "reward") > 0)) continue;
    if (value.verdict === "none" && row[textAt.parsed] != null) continue;
    if (hits && !hits.has(row[textAt.text]) && !hits.has(row[textAt.question])) continue;
    kept.push(i);
  }
  const by = {length: i => -number(rows[i], "length"), reward: i => -number(rows[i], "reward"),
    logp: i => (number(rows[i], "logp_sum") ?? -1e300) / sampled(rows[i])}[value.sort];  // null: not finite
  return by ? kept.sort((a, b) => by(a) - by(b)) : kept;
}

function changes() {
  const series = $("series").value, before = Number($("before").value), after = Number($("after").value);
  const solved = step => {
    const found = new Map();
    rows.forEach((row, i) => {
      if (text(row, "suite") == null || seriesOf(row) !== series || number(row, "step") !== step) return;
      const question = row[textAt.question], entry = found.get(question) ?? {right: 0, count: 0, first: i};
      entry.right += row[CORRECT]; entry.count += 1; found.set(question, entry);
    });
    return found;
  };
  const a = solved(before), b = solved(after), made = [];
  for (const [question, now] of b) {
    const then = a.get(question);
    if (!then) continue;
    const difference = now.right / now.count - then.right / then.count;
    const kind = difference > 0 ? "learned" : difference < 0 ? "lost" : "";
    if (!$("change").value || $("change").value === kind) made.push({row: now.first, then, now, kind});
  }
  return made;
}

function redraw() {
  const rollouts = state.view === "rollouts";
  $("tab-rollouts").setAttribute("aria-pressed", rollouts);
  $("tab-changes").setAttribute("aria-pressed", !rollouts);
  $("changes").hidden = rollouts;
  $("filters").hidden = !rollouts;
  found = rollouts ? filtered().map(i => ({row: i})) : changes();
  const learned = found.filter(f => f.kind === "learned").length, lost = found.filter(f => f.kind === "lost").length;
  $("count").textContent = rollouts
    ? `${found.length.toLocaleString()} of ${rows.length.toLocaleString()} rollouts`
      + (state.follow == null ? "" : "; following one problem over the run")
    : $("before").value === $("after").value ? "learned and lost need two evaluations of a suite: choose two steps"
    : `${found.length.toLocaleString()} problems in both evaluations shown: ${learned} learned, ${lost} lost`;
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
  $("shown").replaceChildren(...found.slice(first, last).map((entry, k) => {
    const row = rows[entry.row], right = row[CORRECT];
    const where = entry.then ? `problem ${number(row, "problem")}`
      : `${number(row, "step")} · ${text(row, "suite") ?? text(row, "phase")} · ${number(row, "problem")}.${number(row, "attempt")}`;
    const mark = entry.then ? {learned: "+", lost: "−", "": "="}[entry.kind] : right ? "✓" : "✗";
    const good = entry.then ? entry.kind === "learned" : right;
    return element("div", {class: "row", role: "option", id: "row-" + (first + k), "aria-posinset": first + k + 1, "aria-setsize": found.length, "aria-selected": String(state.selected === entry.row),
      onclick: () => select(entry.row)},
      element("span", {class: "mark " + (good ? "right" : "wrong"), "aria-label": entry.then ? entry.kind || "same" : right ? "correct" : "wrong"}, mark),
      element("span", {class: "where"}, visible(where)),
      element("span", {class: "what"}, visible((text(row, "question") ?? "").slice(0, 200).replace(/\s+/g, " "))),
      element("span", {class: "facts"}, entry.then ? `${entry.then.right}/${entry.then.count} → ${entry.now.right}/${entry.now.count}`
        : String(number(row, "length"))));
  }));
  const active = found.findIndex(f => f.row === state.selected);
  if (active >= first && active < last) $("list").setAttribute("aria-activedescendant", "row-" + active);
  else $("list").removeAttribute("aria-activedescendant");
}

function select(i) { state.selected = i; draw(); detail(); remember(); }

function move(by) {
  if (!found.length) return;
  const now = found.findIndex(f => f.row === state.selected), next = Math.min(found.length - 1, Math.max(0, now < 0 ? 0 : now + by));
  const top = next * HEIGHT, list = $("list");
  if (top < list.scrollTop || top + HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top - list.clientHeight / 2;
  select(found[next].row);
}

function colourOf(row, kind, token) {
  if (kind === "log-prob") {
    const depth = Math.min(1, -(token.logp ?? -4) / 4);  // null: not finite
    return `color-mix(in srgb, #D55E00 ${Math.round(depth * 70)}%, transparent)`;
  }
  return token.author === "m" ? "transparent" : "color-mix(in srgb, #0072B2 35%, transparent)";
}

function written(row, mean) {
  const tokens = row[TOKENS], whole = visible(text(row, "text") ?? "");
  if (state.colour === "reward") {
    const gain = (number(row, "reward") ?? 0) - mean, share = Math.round(Math.min(1, Math.abs(gain)) * 45);
    const made = element("pre", {}, whole);
    made.style.background = `color-mix(in srgb, ${gain >= 0 ? "#009E73" : "#D55E00"} ${share}%, transparent)`;
    return made;
  }
  if (state.colour === "none" || !tokens) return element("pre", {}, whole);
  const [pieces, logp, author] = tokens, names = {m: "model", t: "tool", f: "forced"};
  return element("pre", {}, pieces.map((piece, i) => {
    const token = {logp: logp[i], author: author[i]};
    const made = element("span", {title: `log-prob ${logp[i] ?? "none"}, ${names[author[i]] ?? author[i]}`}, visible(piece));
    made.style.background = colourOf(row, state.colour, token);
    return made;
  }));
}

function legend() {
  const swatch = (colour, label) => {
    const made = element("span", {class: "swatch"}, label);
    made.style.background = colour;
    return made;
  };
  if (state.colour === "log-prob") return ["likely", swatch(colourOf(null, "log-prob", {logp: -1}), "−1"),
    swatch(colourOf(null, "log-prob", {logp: -2}), "−2"), swatch(colourOf(null, "log-prob", {logp: -4}), "−4 and less")];
  if (state.colour === "reward") return [swatch("color-mix(in srgb, #009E73 45%, transparent)", "above the group's mean reward"),
    swatch("color-mix(in srgb, #D55E00 45%, transparent)", "below it")];
  if (state.colour === "author") return ["model", swatch("color-mix(in srgb, #0072B2 35%, transparent)", "forced or tool")];
  return [];
}

function attempts(indices) {
  const mean = indices.reduce((sum, i) => sum + (number(rows[i], "reward") ?? 0), 0) / indices.length;
  return element("div", {class: "attempts"}, indices.map(i => {
    const row = rows[i], right = row[CORRECT], parsed = text(row, "parsed");
    return element("div", {class: "attempt" + (i === state.selected ? " selected" : ""), "data-row": i},
      element("div", {class: "verdict"}, element("strong", {class: right ? "right" : "wrong"}, right ? "✓ correct" : "✗ wrong"),
        ` reward ${number(row, "reward")}, `, parsed == null ? "no answer found" : "answered " + visible(parsed),
        text(row, "reason") ? ` (${visible(text(row, "reason"))})` : ""),
      element("div", {class: "facts"}, `attempt ${number(row, "attempt")}, ${number(row, "length")} tokens, stop: ${visible(text(row, "stop") ?? "")}, `
        + `mean log-prob ${number(row, "logp_sum") == null ? "none" : (number(row, "logp_sum") / sampled(row)).toFixed(3)}`),
      written(row, mean));
  }));
}

function timeline(question) {
  const seen = distinct((byQuestion.get(question) ?? []).map(i => groupOf(rows[i])));
  if (seen.length < 2) return null;
  return element("div", {}, element("h2", {}, "This problem over the run"), element("div", {class: "timeline"}, seen.map(key => {
    const indices = groups.get(key), right = indices.filter(i => rows[i][CORRECT]).length, row = rows[indices[0]];
    return element("button", {class: right ? "right" : "wrong", title: visible(`step ${number(row, "step")}, ${seriesOf(row)}: ${right} of ${indices.length} correct`),
      onclick: () => select(indices[0])}, `${number(row, "step")}: ${right}/${indices.length}`);
  })));
}

function detail() {
  const row = rows[state.selected], focused = $("detail").contains(document.activeElement) ? document.activeElement.id : "";
  if (!row) {
    $("detail").replaceChildren(element("p", {class: "facts"}, "Select a rollout: click, or press j."));
    return;
  }
  const indices = groups.get(groupOf(row)), prompt = text(row, "prompt"), followed = state.follow === row[textAt.question];
  const colour = element("select", {id: "colour", onchange: event => { state.colour = event.target.value; detail(); remember(); }},
    COLOURS.map(name => element("option", {value: name, selected: state.colour === name}, name === "none" ? "no colours" : name)));
  const lacks = !row[TOKENS] && ["log-prob", "author"].includes(state.colour);
  const other = state.view === "changes" ? found.find(f => f.row === state.selected)?.then : null;
  $("detail").replaceChildren(...[
    element("h2", {}, visible(`Step ${number(row, "step")}, ${text(row, "phase")}, ${seriesOf(row)}, problem ${number(row, "problem")}`)),
    element("pre", {class: "question"}, visible(text(row, "question") ?? "")),
    element("p", {class: "facts"}, "expected answer: ", element("strong", {}, visible(text(row, "answer") ?? ""))),
    prompt && prompt !== text(row, "question") ? element("details", {}, element("summary", {}, "whole prompt"), element("pre", {class: "question"}, visible(prompt))) : null,
    element("div", {class: "bar"}, element("label", {}, "colour tokens by ", colour), element("span", {class: "legend"}, legend()),
      element("button", {id: "follow", onclick: follow}, followed ? "stop following" : "follow this problem ( f )")),
    lacks ? element("p", {class: "note"}, "No data per token in this rollout; --config.log.rollout_tokens=True writes them.") : null,
    element("h2", {}, indices.length === 1 ? "1 attempt" : `${indices.length} attempts, ${indices.filter(i => rows[i][CORRECT]).length} correct`),
    attempts(indices),
    other ? element("h2", {}, `Before, at step ${number(rows[other.first], "step")}`) : null,
    other ? attempts(groups.get(groupOf(rows[other.first]))) : null,
    timeline(row[textAt.question]),
  ].filter(child => child != null));
  if (focused) $(focused)?.focus();  // what had the keyboard's focus was made again
}

function follow() {
  const question = rows[state.selected]?.[textAt.question];
  if (question == null) return;
  state.follow = state.follow === question ? null : question;
  state.view = "rollouts";
  $("list").scrollTop = 0;
  redraw();
}

function remember() {
  const kept = new URLSearchParams();
  for (const id of FIELDS) if ($(id).value !== "" && (state.view === "changes" || !["series", "before", "after", "change"].includes(id))) kept.set(id, $(id).value);
  for (const name of ["view", "colour"]) if (state[name] !== {view: "rollouts", colour: "none"}[name]) kept.set(name, state[name]);
  if (state.selected != null) kept.set("selected", keyOf(state.selected));
  if (state.follow != null) kept.set("follow", keyOf(byQuestion.get(state.follow)[0]));
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
    selected: selected < 0 ? null : selected, follow: followed < 0 ? null : rows[followed][textAt.question]};
  redraw();
  restoring = false;
}

function steps(series) {
  if (series && [...$("series").options].some(o => o.value === series)) $("series").value = series;
  const here = distinct(rows.filter(r => text(r, "suite") != null && seriesOf(r) === $("series").value).map(r => number(r, "step"))).sort((a, b) => a - b);
  for (const id of ["before", "after"]) options($(id), here, "");
  if (here.length) { $("before").value = here[0]; $("after").value = here[here.length - 1]; }
}

let waiting = null;
$("filters").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => { $("list").scrollTop = 0; redraw(); }, 120); });
$("filters").addEventListener("submit", event => event.preventDefault());
$("changes").addEventListener("input", event => { if (event.target.id === "series") steps($("series").value); redraw(); });
$("clear").addEventListener("click", () => { for (const id of FIELDS.slice(0, 11)) $(id).value = ""; state.follow = null; redraw(); });
$("tab-rollouts").addEventListener("click", () => { state.view = "rollouts"; redraw(); });
$("tab-changes").addEventListener("click", () => { state.view = "changes"; redraw(); });
function help() { $("help").hidden = !$("help").hidden; $("help-button").setAttribute("aria-expanded", !$("help").hidden); }
$("help-button").addEventListener("click", help);
$("list").addEventListener("scroll", draw);
window.addEventListener("resize", draw);
window.addEventListener("hashchange", restore);
document.addEventListener("keydown", event => {
  if (event.key === "Escape") { document.activeElement.blur(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) return;
  const key = {j: () => move(1), k: () => move(-1), ArrowDown: () => move(1), ArrowUp: () => move(-1), f: follow, "?": help,
    "/": () => { if (state.view !== "rollouts") { state.view = "rollouts"; redraw(); } $("search").focus(); }, c: () => { state.colour = COLOURS[(COLOURS.indexOf(state.colour) + 1) % COLOURS.length]; detail(); remember(); }}[event.key];
  if (key) { event.preventDefault(); key(); }
});
restore();
