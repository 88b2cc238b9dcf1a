// The right-hand side of the page: the attempts of a group, their tokens, the problem
// over the run. `view.js` follows in the same script.
const COLOURS = ["none", "log-prob", "advantage", "reward", "author"];
const CHARACTERS = 4000, ATTEMPTS = 32;  // drawn before "show all"
const AUTHORS = {m: "model", t: "tool", f: "forced"};
const ORANGE = "#D55E00", GREEN = "#009E73", BLUE = "#0072B2", PINK = "#CC79A7";
const mixed = (colour, share) => `color-mix(in srgb, ${colour} ${Math.round(share)}%, transparent)`;
const signed = x => x == null ? "none" : (x > 0 ? "+" : "") + Number(x.toFixed(3));

// The start of a text, not ending within a character of two code units.
function start(whole, length) {
  return whole.length <= length ? whole : whole.slice(0, length).replace(/[\ud800-\udbff]$/, "");
}

function unfold(key, label) {
  return element("button", {class: "unfold", id: "unfold-" + key, onclick: () => {
    state.whole.add(key);
    detail();
  }}, label);
}

function long(key, whole, attributes = {}) {
  const all = state.whole.has(key) || whole.length <= CHARACTERS;
  return [element("pre", attributes, visible(all ? whole : start(whole, CHARACTERS))),
    all ? null : unfold(key, `show all ${whole.length.toLocaleString()} characters`)];
}

function meanReward(indices) {
  return indices.reduce((sum, i) => sum + (number(rows[i], "reward") ?? 0), 0) / indices.length;
}

// The value that an attempt is coloured by, and the largest of its group.
function worth(i, indices) {
  const mean = meanReward(indices);
  const of = k => state.colour === "advantage" ? number(rows[k], "advantage") : (number(rows[k], "reward") ?? 0) - mean;
  return [of(i), Math.max(1e-9, ...indices.map(k => Math.abs(of(k) ?? 0)))];
}

function colourOf(token, value, largest) {
  if (state.colour === "log-prob") return token.author === "m" ? mixed(ORANGE, 70 * Math.min(1, -(token.logp ?? -4) / 4)) : "transparent";
  if (state.colour === "author") return {t: mixed(BLUE, 35), f: mixed(PINK, 45)}[token.author] ?? "transparent";
  if (token.author !== "m" || value == null) return "transparent";
  return mixed(value >= 0 ? GREEN : ORANGE, 45 * Math.abs(value) / largest);
}

function coloured(i, indices) {
  const [pieces, logp, author] = rows[i][TOKENS], [value, largest] = worth(i, indices), key = "text-" + i;
  const made = [];
  let length = 0;
  for (let k = 0; k < pieces.length && (length <= CHARACTERS || state.whole.has(key)); k++) {
    const token = {logp: logp[k], author: author[k]}, left = state.whole.has(key) ? Infinity : CHARACTERS;
    const span = element("span", {"data-token": k, class: "author-" + (AUTHORS[author[k]] ?? "other")}, visible(start(pieces[k], left)));
    span.style.background = colourOf(token, value, largest);
    length += Math.max(1, pieces[k].length);
    made.push(span);
  }
  const whole = pieces.reduce((sum, piece) => sum + piece.length, 0);
  return [
    element("pre", {class: "tokens", id: "tokens-" + i, tabindex: 0, role: "group", "aria-describedby": "read-" + i, "data-row": i,
      "aria-label": "tokens; left and right arrow read their values"}, made),
    made.length < pieces.length || whole > CHARACTERS && !state.whole.has(key)
      ? unfold(key, `show all ${whole.toLocaleString()} characters`) : null,
    element("p", {class: "read", id: "read-" + i, "aria-live": "polite"}),
  ];
}

// Show the values of a token below its text.
function readToken(i, k) {
  const [pieces, logp, author] = rows[i][TOKENS], panel = $("tokens-" + i);
  panel.querySelector(".current")?.classList.remove("current");
  const span = panel.querySelector(`[data-token="${k}"]`);
  if (!span) return;
  span.classList.add("current");
  panel.dataset.current = k;
  const advantage = number(rows[i], "advantage"), chance = logp[k] == null ? "" : ` (p = ${Math.exp(logp[k]).toPrecision(3)})`;
  const value = author[k] === "m" ? `, log-prob ${logp[k] ?? "not finite"}${chance}` + (advantage == null ? "" : `, advantage ${signed(advantage)}`) : "";
  $("read-" + i).textContent = `token ${k + 1} of ${pieces.length}: ${visible(JSON.stringify(start(pieces[k], 40)))}, `
    + (AUTHORS[author[k]] ?? "author not known") + value;
}

function moveToken(event) {
  const panel = event.target.closest?.(".tokens");
  if (!panel || event.ctrlKey || event.metaKey || event.altKey) return;
  const now = panel.dataset.current == null ? -1 : Number(panel.dataset.current), last = panel.children.length - 1;
  const next = {ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: last}[event.key];
  if (next == null) return;
  event.preventDefault();
  readToken(Number(panel.dataset.row), Math.min(last, Math.max(0, next)));
  panel.querySelector(".current")?.scrollIntoView({block: "nearest"});
}

function hoverToken(event) {
  const span = event.target.closest?.("[data-token]");
  if (span) readToken(Number(span.parentElement.dataset.row), Number(span.dataset.token));
}

function written(i, indices) {
  const row = rows[i];
  if (state.colour !== "none" && row[TOKENS]) return coloured(i, indices);
  const made = long("text-" + i, text(row, "text") ?? "");
  const [value, largest] = worth(i, indices);
  if (["advantage", "reward"].includes(state.colour) && value != null)
    made[0].style.background = mixed(value >= 0 ? GREEN : ORANGE, 45 * Math.abs(value) / largest);
  return made;
}

function legend(indices) {
  const swatch = (colour, label, kind = "") => {
    const made = element("span", {class: "swatch " + kind}, label);
    made.style.background = colour;
    return made;
  };
  if (state.colour === "log-prob")
    return ["log-prob", ...[0, -0.5, -1, -2, -3].map(logp => swatch(colourOf({logp, author: "m"}), String(logp).replace("-", "−"))),
      swatch(colourOf({logp: -4, author: "m"}), "−4 or less")];
  if (state.colour === "author")
    return [swatch("var(--shade)", "prompt"), swatch("transparent", "model"), swatch(colourOf({author: "t"}), "tool", "author-tool"),
      swatch(colourOf({author: "f"}), "forced", "author-forced")];
  if (state.colour === "none") return [];
  const largest = worth(indices[0], indices)[1], name = state.colour === "reward" ? "reward minus the group's mean" : "advantage";
  if (largest < 1e-6) return [`${name}: ${indices.some(i => worth(i, indices)[0] != null) ? "0 for every attempt" : "not written"}`];
  return [name, ...[-1, -0.5, 0, 0.5, 1].map(share => swatch(colourOf({author: "m"}, share * largest, largest), signed(share * largest)))];
}

function attempt(i, indices) {
  const row = rows[i], right = row[CORRECT], parsed = text(row, "parsed"), reason = text(row, "reason");
  const mean = number(row, "logp_sum") == null ? "none" : signed(number(row, "logp_sum") / sampled(row));
  const advantage = number(row, "advantage") == null ? "" : `, advantage ${signed(number(row, "advantage"))}`;
  return element("section", {class: "attempt" + (i === state.selected ? " selected" : ""), "data-row": i, "aria-label": `attempt ${number(row, "attempt")}`},
    element("div", {class: "verdict"}, element("strong", {class: right ? "right" : "wrong"}, right ? "✓ correct" : "✗ wrong"),
      parsed == null ? " no answer found" : " answered " + visible(start(parsed, 300)), reason ? ` (${visible(start(reason, 300))})` : ""),
    element("div", {class: "facts"}, `attempt ${number(row, "attempt")}, reward ${signed(number(row, "reward"))}${advantage}, ${number(row, "length")} tokens, `
      + `stop: ${visible(start(text(row, "stop") ?? "", 60))}, mean log-prob ${mean}`),
    written(i, indices));
}

function attempts(indices) {
  const key = "group-" + indices[0], all = state.whole.has(key) || indices.length <= ATTEMPTS;
  const shown = all ? indices : indices.filter((i, k) => k < ATTEMPTS || i === state.selected);
  return [element("div", {class: "attempts"}, shown.map(i => attempt(i, indices))),
    all ? null : unfold(key, `show all ${indices.length.toLocaleString()} attempts`)];
}

// How many attempts a group has, whether they are in this page or not.
function madeOf(row) {
  if (text(row, "suite") == null) return data.sizes[text(row, "phase")];
  return evaluated.get(seriesOf(row) + "|" + number(row, "step"))?.samples;
}

function groupTitle(indices) {
  const right = indices.filter(i => rows[i][CORRECT]).length, made = madeOf(rows[indices[0]]);
  const missing = made > indices.length ? `; ${indices.length} of ${made} attempts are in the file` : "";
  return `${indices.length} attempt${indices.length === 1 ? "" : "s"}, ${right} correct${missing}`;
}

function timeline(problem) {
  const lines = new Map(), seen = new Set();
  const add = (series, entry) => lines.has(series) ? lines.get(series).push(entry) : lines.set(series, [entry]);
  for (const i of byProblem.get(problem) ?? []) {
    const key = groupOf(rows[i]), step = number(rows[i], "step");
    if (seen.has(key)) continue;
    const indices = groups.get(key);
    seen.add(key).add(seriesOf(rows[i]) + "|" + step);
    add(seriesOf(rows[i]), {step, right: indices.filter(k => rows[k][CORRECT]).length, count: indices.length, first: indices[0]});
  }
  for (const [key, e] of evaluated) {
    const j = Number(problem.slice(problem.lastIndexOf("|") + 1));
    if (problem !== problemIn(e.suite, j) || j >= e.verdicts.length / e.samples || seen.has(key)) continue;
    add(e.series, {step: e.step, ...countOf(e, j), first: null});
  }
  if ([...lines.values()].reduce((sum, entries) => sum + entries.length, 0) < 2) return null;
  return element("div", {}, element("h2", {}, "This problem over the run"), [...lines].map(([series, entries]) =>
    element("div", {class: "timeline"}, element("span", {class: "facts"}, visible(series + " ")),
      entries.sort((a, b) => a.step - b.step).map(e => element("button", {class: e.right ? "right" : "wrong", disabled: e.first == null,
        "aria-current": e.first != null && state.selected != null && groupOf(rows[e.first]) === groupOf(rows[state.selected]) ? "step" : false,
        title: `step ${e.step}: ${e.right} of ${e.count} correct${e.first == null ? "; not in the file" : ""}`,
        onclick: () => select({row: e.first})}, `${e.step}: ${e.right}/${e.count}`)))));
}

// The head of a problem: its question, its answer, its whole prompt.
function asked(row) {
  const prompt = text(row, "prompt"), question = text(row, "question") ?? "";
  return [long("question", question, {class: "question", tabindex: 0, "aria-label": "question"}),
    text(row, "answer") ? element("p", {class: "facts"}, "expected answer: ",
      element("strong", {}, visible(start(text(row, "answer"), 300)))) : null,
    prompt && prompt !== question ? element("details", {open: state.colour === "author"}, element("summary", {}, "whole prompt"),
      long("prompt", prompt, {class: "question"})) : null].flat();
}

function bar(row, indices) {
  const colour = element("select", {id: "colour", onchange: event => { state.colour = event.target.value; detail(); remember(); }},
    COLOURS.map(name => element("option", {value: name, selected: state.colour === name}, name === "none" ? "no colours" : name)));
  const lacks = !row[TOKENS] && ["log-prob", "author"].includes(state.colour) ? "No data per token in this rollout; --config.log.rollout_tokens=True writes them."
    : state.colour === "advantage" && number(row, "advantage") == null ? "No advantage in this rollout: evaluations have none; older runs did not write it." : "";
  return [element("div", {class: "bar"}, element("label", {}, "colour by ", colour), element("span", {class: "legend"}, legend(indices)),
    indices.some(i => rows[i][TOKENS]) && state.colour !== "none" ? element("span", {class: "facts"}, "point at a token for its values, or press t and ←, →") : null,
    element("button", {id: "follow", onclick: follow}, state.follow === problemOf(row) ? "stop following" : "follow this problem ( f )")),
  lacks ? element("p", {class: "note"}, lacks) : null];
}

// One of the two evaluations of a problem in the view of what was learned and lost.
function side(label, step, outcome) {
  const heading = element("h2", {}, `${label}, at step ${step}: ${outcome.right} of ${outcome.count} correct`);
  if (outcome.first == null) return [heading, element("p", {class: "note"}, "Its attempts are not in the file: config.log.rollouts_kept limits the rollouts that a run writes, --max_mb those of this page.")];
  return [heading, attempts(groups.get(groupOf(rows[outcome.first])))];
}

function detail() {
  const entry = state.view === "changes" ? found.find(f => f.problem === state.changed) : null;
  const row = rows[state.selected], focused = $("detail").contains(document.activeElement) ? document.activeElement.id : "";
  let made;
  if (entry && !row) {
    made = [element("h2", {}, `Problem ${entry.problem}`), side("After", $("after").value, entry.now), side("Before", $("before").value, entry.then)];
  } else if (!row) {
    made = [element("p", {class: "facts"}, state.view === "changes" ? "Select a problem: click, or press j." : "Select a rollout: click, or press j.")];
  } else {
    const indices = groups.get(groupOf(row));
    const title = `Step ${number(row, "step")}, ${text(row, "phase")}, ${seriesOf(row)}, problem ${number(row, "problem")}`;
    made = [element("h2", {}, visible(title), text(row, "task") ? element("span", {class: "facts"}, " " + visible(start(text(row, "task"), 100))) : null),
      asked(row), bar(row, indices),
      entry ? [side("After", $("after").value, entry.now), side("Before", $("before").value, entry.then)]
        : [element("h2", {}, groupTitle(indices)), attempts(indices)],
      timeline(problemOf(row))];
  }
  $("detail").replaceChildren(...made.flat(Infinity).filter(child => child != null));
  if (focused) $(focused)?.focus();  // what had the keyboard's focus was made again
}
