"use strict";
// The list of suspects and all that filters it. Whatever comes from data becomes text by
// `textContent` and attributes that hold no code; the page's policy forbids the rest.
(async () => {
  const ROW = 72; // pixels, as in the style
  const SNOOZE = 7; // days
  const MATRIX = 12; // classes of the matrix
  const PLOTS = 8;
  // What speaks for or against a suspect, by arrays.roles.
  const ROLES = [
    ["Evidence", "nearest examples, or those that it repeats"],
    ["Proponents", "training examples that lower its loss, by TracIn: they speak for its label"],
    ["Opponents", "training examples that raise its loss, by TracIn: they speak against its label"],
  ];
  const VERDICTS = { keep: "K", relabel: "R", drop: "D", snooze: "S" };
  const $ = (id) => document.getElementById(id);

  function el(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === undefined || value === null || value === false) continue;
      if (name === "text") made.textContent = value;
      else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  function svg(tag, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  // An id or a name on one line, cut where it is very long, its controls made visible.
  const CONTROL = /[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g;
  function shown(text) {
    if (text.length > 200) {
      text = `${text.slice(0, 100)} … ${text.slice(-50)} (${text.length.toLocaleString("en")} characters)`;
    }
    return text.replace(CONTROL, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
  }

  function number(value) {
    if (!Number.isFinite(value)) return "";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-3 || size >= 1e7) return value.toExponential(2).replace("-", "−");
    const digits = Math.max(0, 2 - Math.floor(Math.log10(size)));
    const text = value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
    return text.replace("-", "−");
  }

  // ---- What is packed, see packed.py.

  function bytesOf(text) {
    const binary = atob(text);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return bytes;
  }

  async function unpack(id) {
    const text = $(id).textContent.trim();
    if (!text) return { header: { contents: {} }, arrays: {} };
    const packed = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
    const whole = await new Response(packed).arrayBuffer();
    const length = new DataView(whole).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(whole, 4, length)));
    const arrays = {};
    for (const [name, [dtype, start, size]] of Object.entries(header.arrays)) {
      arrays[name] = numbersAt(whole, dtype, 4 + length + start, size);
    }
    return { header, arrays };
  }

  function numbersAt(whole, dtype, start, size) {
    if (dtype === "uint8") return new Uint8Array(whole, start, size);
    if (dtype === "float16") {
      const halves = new Uint16Array(whole.slice(start, start + 2 * size));
      return Float32Array.from(halves, (bits) => HALVES[bits]);
    }
    const Type = dtype === "int32" ? Int32Array : Float64Array;
    return new Type(whole.slice(start, start + Type.BYTES_PER_ELEMENT * size));
  }

  const HALVES = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    const size =
      exponent === 31
        ? fraction ? NaN : Infinity
        : exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction;
    HALVES[bits] = bits & 0x8000 ? -size : size;
  }

  const { header, arrays } = await unpack("core");
  const { ids, names, choices, task } = header;
  const count = arrays.example.length;
  const example = arrays.example;
  const given = (row) => arrays.given[example[row]];
  const suggested = (row) => arrays.suggested[row];

  for (const signal of header.signals) {
    signal.values = arrays["signal " + signal.name].map((value) => value * signal.scale);
    signal.bin = binsOf(signal, signal.values);
  }
  const signalNamed = (name) => header.signals.find((signal) => signal.name === name);

  // The bin of each value, 255 of what is no number.
  function binsOf({ edges, log }, values) {
    const last = edges.length - 2;
    const low = log ? Math.log(edges[0]) : edges[0];
    const width = ((log ? Math.log(edges[last + 1]) : edges[last + 1]) - low) / (last + 1);
    return Uint8Array.from(values, (value) => {
      if (!Number.isFinite(value)) return 255;
      const at = Math.floor(((log ? Math.log(value) : value) - low) / width);
      return at > last ? last : at > 0 ? at : 0;
    });
  }

  function labelText(value) {
    if (!Number.isFinite(value)) return "unknown";
    if (names && Number.isInteger(value) && value >= 0 && value < names.length) return names[value];
    return Number.isInteger(value) ? String(value) : number(value);
  }
  const givenText = (row) => (header.labels[example[row]] || [labelText(given(row))])[0];

  // ---- Contents of examples, which come once the list is there.

  let contents = null;
  const sheets = document.getElementsByClassName("sheet");
  const bitmaps = new Map();

  function sheet(index) {
    if (!bitmaps.has(index)) {
      const blob = new Blob([bytesOf(sheets[index].textContent)], { type: "image/webp" });
      bitmaps.set(index, createImageBitmap(blob));
    }
    return bitmaps.get(index);
  }

  function isPicture(which) {
    return Boolean(contents && contents.arrays.boxes && contents.arrays.boxes[5 * which] >= 0);
  }

  function picture(which, name) {
    const [index, left, top, width, height] = contents.arrays.boxes.subarray(5 * which, 5 * which + 5);
    const pixelated = contents.header.pixelated ? "pixelated" : undefined;
    const canvas = el("canvas", { width, height, role: "img", "aria-label": name, class: pixelated });
    sheet(index).then(
      (bitmap) => canvas.getContext("2d").drawImage(bitmap, left, top, width, height, 0, 0, width, height),
      () => trouble("This browser cannot show WebP pictures."),
    );
    return canvas;
  }

  // An example as it is shown beside its numbers; null if nothing is known of it.
  function content(which, name) {
    if (isPicture(which)) return el("div", { class: "picture" }, picture(which, name));
    const it = contents && contents.header.contents[which];
    if (it === undefined || it === null) return null;
    if (typeof it === "string") return el("p", { class: "text", dir: "auto", text: it });
    if (Array.isArray(it)) {
      const body = it.map(([feature, value]) =>
        el("tr", {},
          el("th", { scope: "row", dir: "auto", text: feature }),
          el("td", { dir: "auto", text: value })));
      return el("div", { class: "features", tabindex: 0, role: "group", "aria-label": name },
        el("table", {}, ...body));
    }
    const src = "data:audio/wav;base64," + it.wav;
    return el("audio", { controls: true, preload: "none", src, "aria-label": name });
  }

  function brief(which) {
    const it = contents && contents.header.contents[which];
    if (typeof it === "string") return it.slice(0, 120);
    return Array.isArray(it) ? it.slice(0, 6).map(([n, v]) => `${n} ${v}`).join(", ") : "";
  }

  function trouble(text) {
    $("trouble").textContent = text;
    $("trouble").hidden = false;
  }

  // ---- Verdicts, an item of the browser's store each.

  const PREFIX = `tracin-beam ${header.store} `;
  const hashOf = (which) =>
    Array.from(arrays.hash.subarray(16 * which, 16 * which + 16), (b) => b.toString(16).padStart(2, "0")).join("");
  const hashes = Array.from({ length: arrays.hash.length / 16 }, (_, which) => hashOf(which));
  const isJudgeable = (which) => which < hashes.length && /[1-9a-f]/.test(hashes[which]);
  const keyOf = (which) => `${PREFIX}${hashes[which]} ${ids[which]}`;
  const verdicts = new Map(); // by key
  const undone = [];

  function readVerdicts() {
    try {
      for (let i = 0; i < localStorage.length; i++) {
        const key = localStorage.key(i);
        if (!key.startsWith(PREFIX)) continue;
        try {
          const kept = JSON.parse(localStorage.getItem(key));
          if (kept && Object.hasOwn(VERDICTS, kept.verdict)) verdicts.set(key, kept);
        } catch { /* not ours */ }
      }
    } catch {
      trouble("This browser keeps nothing for this page: export your verdicts before you close it.");
    }
  }

  function keep(key, verdict) {
    if (verdict) verdicts.set(key, verdict);
    else verdicts.delete(key);
    try {
      if (verdict) localStorage.setItem(key, JSON.stringify(verdict));
      else localStorage.removeItem(key);
    } catch {
      trouble("This browser keeps no more: export your verdicts before you close the page.");
    }
  }

  // Like the ledger, a verdict holds for the label that was looked at.
  function verdictOf(row) {
    const found = isJudgeable(example[row]) ? verdicts.get(keyOf(example[row])) : undefined;
    const label = given(row);
    const same = !found || found.given_label === undefined || found.given_label === label;
    return same || !Number.isFinite(label) ? found : undefined;
  }

  function judge(verdict) {
    if (active < 0) return;
    const row = list[active];
    const which = example[row];
    if (!isJudgeable(which)) {
      say("The tables do not say which record this is, or its id is too long for the ledger: it cannot be judged.");
      return;
    }
    const made = {
      id: ids[which],
      content_hash: hashes[which],
      verdict,
      who: $("who").value.trim(),
      when: new Date().toISOString(),
      why: $("why").value,
    };
    if (Number.isFinite(given(row))) made.given_label = given(row);
    if (verdict === "relabel") {
      const chosen = $("label") && $("label").value !== "" ? Number($("label").value) : NaN;
      if (!Number.isFinite(chosen)) {
        say("Choose a label first.");
        if ($("label")) $("label").focus();
        return;
      }
      made.label = chosen;
    }
    if (verdict === "snooze") {
      made.until = $("until").value;
      if (!/^\d{4}-\d\d-\d\d$/.test(made.until)) {
        say("Choose the day on which it is asked again.");
        $("until").focus();
        return;
      }
    }
    undone.push([keyOf(which), verdicts.get(keyOf(which)), row]);
    keep(keyOf(which), made);
    changedVerdicts();
    const next = nextOpen(row);
    say(`${verdict}: ${shown(ids[which])}.` + (next < 0 ? " No suspect here is left without a verdict." : ""));
    if (next >= 0) select(next);
    else renderDetail();
    $("list").focus({ preventScroll: true });
  }

  function undo() {
    const last = undone.pop();
    if (!last) {
      say("Nothing to undo.");
      return;
    }
    const [key, before, row] = last;
    keep(key, before);
    changedVerdicts();
    const at = list.indexOf(row);
    if (at >= 0) select(at);
    say(`Undone: ${shown(ids[example[row]])}.`);
  }

  // The place after a row, or from the start, of one without a verdict.
  function nextOpen(row) {
    const from = list.indexOf(row);
    for (let i = 1; i <= list.length; i++) {
      const at = (from + i + list.length) % list.length;
      if (!verdictOf(list[at])) return at;
    }
    return -1;
  }

  function changedVerdicts() {
    if (filters.verdict) apply("verdict");
    renderRows(true);
    progress();
  }

  function progress() {
    let done = 0;
    for (let row = 0; row < count; row++) done += verdictOf(row) ? 1 : 0;
    $("progress").textContent = `${done.toLocaleString("en")} of ${count.toLocaleString("en")} suspects here have a verdict.`;
    $("export").disabled = $("forget").disabled = verdicts.size === 0;
  }

  function exportVerdicts() {
    const who = $("who").value.trim();
    if (!verdicts.size) {
      say("There are no verdicts yet.");
      return;
    }
    if (!who && [...verdicts.values()].some((one) => !one.who)) {
      say("Say who you are, for the ledger.");
      $("who").focus();
      return;
    }
    const lines = [...verdicts.values()].map((one) => JSON.stringify({ ...one, who: one.who || who }) + "\n");
    const file = new Blob(lines, { type: "application/x-ndjson" });
    const link = el("a", {
      href: URL.createObjectURL(file),
      download: `verdicts-${header.date}-${(who || "all").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}.jsonl`,
    });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    say(`${verdicts.size.toLocaleString("en")} verdicts exported.`);
  }

  function forget() {
    if (!confirm(`Forget ${verdicts.size} verdicts that this browser keeps? What was exported stays.`)) return;
    for (const key of [...verdicts.keys()]) keep(key, undefined);
    undone.length = 0;
    changedVerdicts();
    renderDetail();
  }

  // ---- Filters: each is a bit of what excludes a row, so that one that changes costs one pass.

  const filters = {}; // by name: a function of a row that says whether it passes
  const bits = new Map();
  const excluded = new Uint32Array(count);
  let list = new Int32Array(0); // rows that pass, in order
  let active = -1; // place in the list

  function bitOf(name) {
    if (!bits.has(name)) bits.set(name, 1 << bits.size);
    return bits.get(name);
  }

  function setFilter(name, passes) {
    if (passes) filters[name] = passes;
    else delete filters[name];
    apply(name);
  }

  function apply(name) {
    const bit = bitOf(name);
    const passes = filters[name];
    for (let row = 0; row < count; row++) {
      if (passes && !passes(row)) excluded[row] |= bit;
      else excluded[row] &= ~bit;
    }
  }

  function refresh() {
    const before = active >= 0 ? list[active] : -1;
    list = order.filter((row) => excluded[row] === 0);
    const many = (n) => n.toLocaleString("en");
    $("count").textContent = list.length === count ? `${many(count)} suspects` : `${many(list.length)} of ${many(count)} suspects`;
    $("clear").disabled = Object.keys(filters).length === 0;
    for (const draw of drawings) draw();
    const at = list.indexOf(before);
    $("list").scrollTop = 0;
    select(at >= 0 ? at : list.length ? 0 : -1);
  }

  const drawings = [];

  let order = Int32Array.from({ length: count }, (_, row) => row);
  function sort() {
    const signal = signalNamed($("sort").value);
    const sign = $("reverse").checked ? 1 : -1;
    order = Int32Array.from({ length: count }, (_, row) => row);
    if (signal) {
      const missing = Infinity;
      const value = (row) => (Number.isNaN(signal.values[row]) ? missing : sign * signal.values[row]);
      const values = Float64Array.from(order, value);
      order.sort((a, b) => (values[a] < values[b] ? -1 : values[a] > values[b] ? 1 : a - b));
    }
    active = -1; // the first in the new order is what is wanted
    refresh();
  }

  // ---- Choices

  const choosers = new Map();

  // A choice among values: options in the order of how many rows have them.
  function chooser(name, title, valueOf, textOf, fixed) {
    const counts = new Map();
    if (!fixed) {
      for (let row = 0; row < count; row++) counts.set(valueOf(row), (counts.get(valueOf(row)) || 0) + 1);
      if (counts.size < 2) return;
    }
    const all = [...counts].sort((a, b) => b[1] - a[1]);
    const options = fixed || all.slice(0, 1000).map(([value, n]) => [value, `${textOf(value)} (${n.toLocaleString("en")})`]);
    const control = el("select", { id: `choose-${name}` }, el("option", { value: "", text: "all" }),
      ...options.map(([, text], i) => el("option", { value: String(i), text })));
    const choose = (value) => {
      const at = options.findIndex((option) => Object.is(option[0], value));
      control.value = at < 0 ? "" : String(at);
      changed();
    };
    const changed = () => {
      control.toggleAttribute("data-set", control.value !== "");
      const wanted = control.value === "" ? undefined : options[Number(control.value)][0];
      setFilter(name, wanted === undefined ? null : (row) => Object.is(valueOf(row), wanted));
    };
    control.addEventListener("change", () => {
      changed();
      refresh();
    });
    const chosen = () => (control.value === "" ? undefined : options[Number(control.value)][0]);
    choosers.set(name, { choose, chosen, reset: () => { control.value = ""; control.removeAttribute("data-set"); } });
    $("selects").append(el("label", {}, title + " ", control));
  }

  const codes = (name) => (row) => arrays[name][row];
  const coded = (name) => (code) => shown(choices[name][code]) || "unknown";
  chooser("kind", "Kind", codes("kind"), coded("kind"));
  if (task !== "regression") {
    chooser("given", "Given label", given, labelText);
    chooser("suggested", "Suggested", suggested, labelText);
  }
  chooser("shard", "Shard", codes("shard"), coded("shard"));
  chooser("cohort", "Cohort", codes("cohort"), coded("cohort"));
  chooser("first_seen", "First seen", codes("first_seen"), coded("first_seen"));
  chooser("verdict", "Verdict", (row) => (verdictOf(row) ? verdictOf(row).verdict : "none"), null, [
    ["none", "without one"], ...Object.keys(VERDICTS).map((name) => [name, name])]);

  let texts = null; // what is searched, in lower case
  function search() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    if (!texts) {
      texts = Array.from(example, (which, row) => {
        const it = contents && contents.header.contents[which];
        const body = typeof it === "string" ? it : Array.isArray(it) ? it.flat().join(" ") : "";
        return `${ids[which]} ${givenText(row)} ${labelText(suggested(row))} ${body}`.toLowerCase();
      });
    }
    setFilter("search", words.length ? (row) => words.every((word) => texts[row].includes(word)) : null);
    refresh();
  }

  // ---- Plots

  // A grid of cells with a cursor that arrow keys move; Enter and a click pick one.
  function grid(picture, columns, rows, describe, pick) {
    let at = 0;
    const title = svg("title", {});
    const cursor = svg("rect", { class: "cursor", width: 1, height: 100 / rows, visibility: "hidden" });
    const show = (visible) => {
      cursor.setAttribute("x", Math.floor(at / rows));
      cursor.setAttribute("y", ((rows - 1 - (at % rows)) * 100) / rows);
      cursor.setAttribute("visibility", visible ? "visible" : "hidden");
      picture.setAttribute("aria-valuenow", String(at));
      picture.setAttribute("aria-valuetext", describe(at));
    };
    const place = (event) => {
      const box = picture.getBoundingClientRect();
      const share = (from, size, cells) => Math.min(cells - 1, Math.max(0, Math.floor((from / size) * cells)));
      const x = share(event.clientX - box.left, box.width, columns);
      return x * rows + rows - 1 - share(event.clientY - box.top, box.height, rows);
    };
    picture.setAttribute("tabindex", "0");
    picture.setAttribute("role", "slider");
    picture.setAttribute("aria-valuemin", "0");
    picture.setAttribute("aria-valuemax", String(columns * rows - 1));
    picture.addEventListener("focus", () => show(picture.matches(":focus-visible")));
    picture.addEventListener("blur", () => show(false));
    picture.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -rows, ArrowRight: rows, ArrowUp: rows > 1 ? 1 : rows, ArrowDown: rows > 1 ? -1 : -rows }[event.key];
      if (event.key === "Enter" || event.key === " ") pick(at, event.shiftKey);
      else if (move && at + move >= 0 && at + move < columns * rows) at += move;
      else if (!move) return;
      show(true);
      event.preventDefault();
      event.stopPropagation();
    });
    picture.addEventListener("click", (event) => {
      at = place(event);
      pick(at, event.shiftKey);
    });
    picture.addEventListener("pointermove", (event) => {
      title.textContent = describe(place(event));
    });
    picture.prepend(title);
    picture.append(cursor);
  }

  const ends = (edges) =>
    el("div", { class: "ends", "aria-hidden": "true" }, el("span", { text: number(edges[0]) }), el("span", { text: number(edges[edges.length - 1]) }));
  const words = (name) => shown(name.replaceAll("_", " "));

  function histogram(signal) {
    const { name, edges, bin } = signal;
    const bins = edges.length - 1;
    const filter = "signal " + name;
    let range = null;
    const picture = svg("svg", { viewBox: `0 0 ${bins} 100`, preserveAspectRatio: "none", "aria-label": `${words(name)}: filter by a range` });
    const caption = el("span", { text: signal.log ? "log scale" : "" });
    const most = Math.max(...signal.everywhere, 1);
    for (const [i, n] of signal.everywhere.entries()) {
      const height = n ? 100 * Math.sqrt(n / most) : 0;
      picture.append(svg("rect", { class: "all", x: i, y: 100 - height, width: 1, height }));
    }
    const bars = edges.slice(1).map((_, i) => svg("rect", { class: "bar", x: i + 0.06, width: 0.88 }));
    picture.append(...bars);
    const counts = new Uint32Array(bins);
    const describe = (i) => `${number(edges[i])} to ${number(edges[i + 1])}: ${counts[i]} suspects`;
    grid(picture, bins, 1, describe, (i, extend) => {
      if (range && extend) range = [Math.min(range[0], i), Math.max(range[1], i)];
      else range = range && range[0] === i && range[1] === i ? null : [i, i];
      setFilter(filter, range && ((row) => bin[row] >= range[0] && bin[row] <= range[1]));
      refresh();
    });
    const bit = bitOf(filter);
    drawings.push(() => {
      if (!filters[filter]) range = null;
      counts.fill(0);
      for (let row = 0; row < count; row++) {
        if ((excluded[row] & ~bit) === 0 && bin[row] !== 255) counts[bin[row]]++;
      }
      const top = Math.max(...counts, 1);
      bars.forEach((bar, i) => {
        const height = counts[i] ? Math.max(2, 100 * Math.sqrt(counts[i] / top)) : 0;
        bar.setAttribute("y", 100 - height);
        bar.setAttribute("height", height);
        bar.setAttribute("class", !range || (i >= range[0] && i <= range[1]) ? (range ? "on" : "bar") : "bar out");
      });
      caption.textContent = range
        ? `${number(edges[range[0]])} to ${number(edges[range[1] + 1])}`
        : signal.log ? "log scale" : "";
    });
    return el("figure", { class: "plot", title: signal.about || undefined },
      el("figcaption", {}, el("b", { text: words(name) }), caption), picture, ends(edges));
  }

  function curves(curve) {
    const columns = curve.steps.length;
    const rows = curve.edges.length - 1;
    const values = arrays[curve.column].map((value) => value * curve.scale);
    const bin = binsOf(curve, values);
    const filter = "curve " + curve.name;
    const bit = bitOf(filter);
    const counts = new Uint32Array(columns * rows);
    let picked = -1;
    const picture = svg("svg", { viewBox: `0 0 ${columns} 100`, preserveAspectRatio: "none", "aria-label": `${words(curve.name)} by checkpoint: filter by a checkpoint and a range` });
    const high = 100 / rows;
    const top = (i) => (rows - 1 - (i % rows)) * high;
    const cells = Array.from(counts, (_, i) =>
      svg("rect", { class: "cell", x: Math.floor(i / rows), y: top(i), width: 1, height: high }));
    const own = svg("polyline", { class: "own", points: "" });
    const mark = svg("rect", { class: "picked", width: 1, height: high, visibility: "hidden" });
    picture.append(...cells, own, mark);
    const describe = (i) => {
      const [c, r] = [Math.floor(i / rows), i % rows];
      return `step ${curve.steps[c]}, ${number(curve.edges[r])} to ${number(curve.edges[r + 1])}: ${counts[i]} suspects`;
    };
    grid(picture, columns, rows, describe, (i) => {
      picked = picked === i ? -1 : i;
      const [c, r] = [Math.floor(i / rows), i % rows];
      setFilter(filter, picked < 0 ? null : (row) => bin[row * columns + c] === r);
      refresh();
    });
    drawings.push(() => {
      if (!filters[filter]) picked = -1;
      counts.fill(0);
      for (let row = 0; row < count; row++) {
        if ((excluded[row] & ~bit) !== 0) continue;
        for (let c = 0; c < columns; c++) {
          const r = bin[row * columns + c];
          if (r !== 255) counts[c * rows + r]++;
        }
      }
      const most = Math.max(...counts, 1);
      cells.forEach((cell, i) => {
        cell.setAttribute("fill-opacity", counts[i] ? (0.12 + 0.88 * Math.sqrt(counts[i] / most)).toFixed(3) : "0.03");
      });
      mark.setAttribute("visibility", picked < 0 ? "hidden" : "visible");
      mark.setAttribute("x", Math.floor(picked / rows));
      mark.setAttribute("y", top(Math.max(picked, 0)));
    });
    selections.push((row) => {
      const points = [];
      for (let c = 0; row >= 0 && c < columns; c++) {
        const r = bin[row * columns + c];
        if (r !== 255) points.push(`${c + 0.5},${(rows - r - 0.5) * high}`);
      }
      own.setAttribute("points", points.join(" "));
    });
    const range = `${number(curve.edges[0])} to ${number(curve.edges[rows])}${curve.log ? ", log scale" : ""}`;
    const steps = el("div", { class: "ends", "aria-hidden": "true" },
      ...[`step ${curve.steps[0]}`, range, `step ${curve.steps[columns - 1]}`].map((text) => el("span", { text })));
    return el("figure", { class: "plot curves", title: "how many suspects are where; the line is the chosen one" },
      el("figcaption", {}, el("b", { text: `${words(curve.name)} by checkpoint` })), picture, steps);
  }

  function matrix() {
    if (task === "regression" || !choosers.has("given") || !choosers.has("suggested")) return null;
    const counts = new Map();
    for (let row = 0; row < count; row++) {
      if (!Number.isFinite(given(row)) || !Number.isFinite(suggested(row))) continue;
      for (const value of [given(row), suggested(row)]) counts.set(value, (counts.get(value) || 0) + 1);
    }
    const top = [...counts].sort((a, b) => b[1] - a[1]).slice(0, MATRIX).map(([value]) => value).sort((a, b) => a - b);
    if (top.length < 2) return null;
    const place = new Map(top.map((value, i) => [value, i]));
    const size = top.length;
    const cells = top.map(() => top.map(() => null));
    const bit = bitOf("given") | bitOf("suggested");
    const pick = (g, s) => {
      const [one, other] = [choosers.get("given"), choosers.get("suggested")];
      const same = Object.is(one.chosen(), g) && Object.is(other.chosen(), s);
      one.choose(same ? undefined : g);
      other.choose(same ? undefined : s);
      refresh();
    };
    const body = top.map((g, i) =>
      el("tr", {}, el("th", { scope: "row", text: labelText(g), title: labelText(g) }),
        ...top.map((s, j) => {
          cells[i][j] = el("button", { type: "button", text: "·", "aria-label": `given ${labelText(g)}, suggested ${labelText(s)}: 0`, onclick: () => pick(g, s) });
          return el("td", {}, cells[i][j]);
        })));
    drawings.push(() => {
      const sums = new Uint32Array(size * size);
      for (let row = 0; row < count; row++) {
        if ((excluded[row] & ~bit) !== 0) continue;
        const [i, j] = [place.get(given(row)), place.get(suggested(row))];
        if (i !== undefined && j !== undefined) sums[i * size + j]++;
      }
      const most = Math.max(...sums, 1);
      const [g, s] = [choosers.get("given").chosen(), choosers.get("suggested").chosen()];
      cells.forEach((line, i) => line.forEach((cell, j) => {
        const n = sums[i * size + j];
        if (cell.textContent !== String(n || "·")) {
          cell.textContent = n || "·";
          cell.setAttribute("aria-label", `given ${labelText(top[i])}, suggested ${labelText(top[j])}: ${n}`);
        }
        cell.setAttribute("data-heat", n ? Math.ceil((4 * n) / most) : 0);
        cell.setAttribute("aria-pressed", String(Object.is(g, top[i]) && Object.is(s, top[j])));
      }));
    });
    const more = counts.size > size ? `, the ${size} most frequent of ${counts.size}` : "";
    return el("div", { class: `plot matrix${size > 6 ? " wide" : ""}` },
      el("table", {}, el("caption", {}, el("b", { text: "given label" }), ` (rows) × suggested (columns)${more}`),
        el("thead", {}, el("tr", {}, el("td", {}), ...top.map((s) => el("th", { scope: "col", text: labelText(s), title: labelText(s) })))),
        el("tbody", {}, ...body)));
  }

  const selections = []; // what a change of the chosen suspect redraws
  const same = (one, other) => one && other && one.values.every((value, row) => Object.is(value, other.values[row]));
  const twice = same(signalNamed("score"), signalNamed("mislabel_score")) ? "score" : "";
  const plotted = header.signals.filter((signal) => signal.name !== "confidence" && signal.name !== twice);
  $("plots").append(...[
    matrix(),
    ...header.curves.map(curves),
    ...plotted.filter((signal, i) => i < PLOTS).map(histogram)].filter(Boolean));

  // ---- The list, of which what is seen is there

  const HAS_PICTURES = sheets.length > 0;
  let drawn = "";

  function renderRows(force) {
    const box = $("list");
    const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 4);
    const last = Math.min(list.length, first + Math.ceil((box.clientHeight || 600) / ROW) + 8);
    const now = `${first} ${last}`;
    if (!force && now === drawn) return;
    drawn = now;
    $("rows").style.height = `${list.length * ROW}px`;
    const made = [];
    for (let at = first; at < last; at++) made.push(rowOf(at));
    $("rows").replaceChildren(...made);
    if (active >= 0 && active >= first && active < last) box.setAttribute("aria-activedescendant", `row-${active}`);
    else box.removeAttribute("aria-activedescendant");
  }

  function labelsOf(row, arrow) {
    const to = suggested(row);
    const line = el("p", { class: arrow }, el("bdi", { text: givenText(row) }));
    if (Number.isFinite(to) && to !== given(row)) {
      line.append(el("span", { class: "arrow", text: "→", "aria-label": "suggested:" }), el("bdi", { class: "to", text: labelText(to) }));
    }
    return line;
  }

  function rowOf(at) {
    const row = list[at];
    const which = example[row];
    const verdict = verdictOf(row);
    const score = signalNamed("score");
    const text = brief(which);
    const made = el("div", {
      id: `row-${at}`, role: "option", class: `row${HAS_PICTURES ? "" : " bare"}${verdict ? " done" : ""}`,
      "aria-selected": String(at === active), "aria-setsize": list.length, "aria-posinset": at + 1,
      onclick: () => { select(at); open(true); },
    },
    HAS_PICTURES ? (isPicture(which) ? picture(which, "") : el("span", {})) : null,
    el("div", {}, labelsOf(row),
      text ? el("p", { class: "small", dir: "auto", text }) : null,
      el("p", { class: "small" }, el("bdi", { text: shown(ids[which]) }))),
    el("div", { class: "right" }, el("p", {}, el("b", { text: score ? number(score.values[row]) : "" })),
      verdict ? el("span", { class: `mark ${verdict.verdict}`, text: verdict.verdict })
        : el("p", { class: "small", text: coded("kind")(arrays.kind[row]) })));
    made.style.top = `${at * ROW}px`;
    return made;
  }

  function select(at) {
    active = at;
    if (at >= 0) {
      const box = $("list");
      const top = at * ROW;
      if (top < box.scrollTop) box.scrollTop = top;
      else if (top + ROW > box.scrollTop + box.clientHeight) box.scrollTop = top + ROW - box.clientHeight;
    }
    renderRows(true);
    renderDetail();
    for (const draw of selections) draw(at >= 0 ? list[at] : -1);
  }

  function step(by) {
    if (list.length) select(Math.min(list.length - 1, Math.max(0, active + by)));
  }

  function open(is) {
    $("detail").classList.toggle("open", is);
    if (is && getComputedStyle($("back")).display !== "none") $("back").focus();
    else $("list").focus({ preventScroll: true });
  }

  function day(later) {
    const when = new Date(Math.max(Date.now(), Date.parse(header.date) || 0) + later * 86_400_000);
    return when.toISOString().slice(0, 10);
  }

  function renderDetail() {
    const box = $("detail");
    if (active < 0) {
      box.replaceChildren(el("p", { class: "none", text: "No suspect passes the filters." }));
      return;
    }
    const row = list[active];
    const which = example[row];
    const verdict = verdictOf(row);
    const name = shown(ids[which]);
    const it = content(which, `The example ${name}`);
    const other = header.labels[which];
    const said = el("div", {},
      el("h2", {}, el("bdi", { text: name })),
      labelsOf(row, "labels"),
      other && other[1] ? el("p", { class: "where", text: `predicted: ${other[1]}` }) : null,
      el("p", { class: "where" },
        `${kindsOf(which)} · position ${arrays.position[row].toLocaleString("en")} of `, el("bdi", { text: coded("shard")(arrays.shard[row]) }),
        ` · ${coded("cohort")(arrays.cohort[row])} · first seen ${coded("first_seen")(arrays.first_seen[row])}`),
      controls(row, verdict));
    const values = header.signals.filter((signal) => Number.isFinite(signal.values[row]));
    const numbers = el("dl", { class: "numbers" }, ...values.map((signal) =>
      el("div", { title: signal.about || undefined }, el("dt", { text: words(signal.name) }), el("dd", { text: number(signal.values[row]) }))));
    const start = row ? arrays.ends[row - 1] : 0;
    const supports = arrays.supports.subarray(start, arrays.ends[row]);
    const examples = ROLES.flatMap(([heading, about], role) => {
      const some = supports.filter((_, i) => arrays.roles[start + i] === role);
      return some.length ? [el("h3", { text: heading, title: about }), evidence(row, which, some)] : [];
    });
    box.replaceChildren(
      el("div", { id: "moves" },
        el("button", { type: "button", id: "back", text: "← All suspects", onclick: () => open(false) }),
        el("button", { type: "button", text: "Previous", onclick: () => step(-1) }),
        el("button", { type: "button", text: "Next", onclick: () => step(1) })),
      el("div", { class: isPicture(which) ? "top" : it ? "top words" : "top bare" }, it, said),
      ...(examples.length ? examples : [el("p", { class: "where",
        text: "No examples beside it: what speaks for and against a label is looked for of the worst mislabelled ones." })]),
      el("h3", { text: "Signals" }), numbers);
    box.scrollTop = 0;
  }

  // Examples that say something of a suspect.
  function evidence(row, which, some) {
    const tables = compared(which, some);
    if (tables) return tables;
    return el("ul", { class: Array.from(some).some(isPicture) ? "evidence" : "evidence texts" }, ...Array.from(some, (one) => {
      const label = arrays.given[one];
      return el("li", {}, content(one, `Evidence ${shown(ids[one])}`),
        Number.isFinite(label) ? el("p", { class: Object.is(label, suggested(row)) ? "to" : undefined }, el("bdi", { text: labelText(label) })) : null,
        el("p", { class: "where" }, el("bdi", { text: shown(ids[one]) })));
    }));
  }

  // Features of a suspect beside those of its evidence; null if they are no features.
  function compared(which, supports) {
    const all = [which, ...supports];
    const tables = all.map((one) => contents && contents.header.contents[one]);
    if (tables.length < 2 || !tables.every(Array.isArray)) return null;
    const known = tables.map((table) => new Map(table));
    const head = all.map((one) => el("th", { scope: "col" }, el("bdi", { text: shown(ids[one]) })));
    const labels = all.map((one) => el("td", {}, el("bdi", { text: labelText(arrays.given[one]) })));
    const body = tables[0].map(([feature]) =>
      el("tr", {}, el("th", { scope: "row", dir: "auto", text: feature }), ...known.map((table) =>
        el("td", { dir: "auto", text: table.get(feature) ?? "" }))));
    return el("div", { class: "compared", tabindex: 0, role: "group", "aria-label": "Features beside those of the evidence" },
      el("table", {}, el("thead", {}, el("tr", {}, el("td", {}), ...head)),
        el("tbody", {}, el("tr", {}, el("th", { scope: "row", text: "label" }), ...labels), ...body)));
  }

  // An example may be a suspect of several kinds.
  function kindsOf(which) {
    const found = new Set();
    for (let row = 0; row < count; row++) if (example[row] === which) found.add(coded("kind")(arrays.kind[row]));
    return [...found].join(", ");
  }

  function controls(row, verdict) {
    const button = (name) =>
      el("button", { type: "button", class: name, "aria-pressed": String(Boolean(verdict && verdict.verdict === name)), onclick: () => judge(name), text: name, "aria-keyshortcuts": VERDICTS[name] },
        el("kbd", { text: VERDICTS[name], "aria-hidden": "true" }));
    const wanted = verdict && verdict.label !== undefined ? verdict.label : suggested(row);
    let label = null;
    if (task !== "multilabel") {
      if (names && names.length <= 2000) {
        label = el("select", { id: "label" }, el("option", { value: "", text: "—" }),
          ...names.map((text, i) => el("option", { value: String(i), text })));
      } else label = el("input", { id: "label", type: "number", step: "any" });
      label.value = Number.isFinite(wanted) ? String(wanted) : "";
    }
    const until = el("input", { id: "until", type: "date" });
    until.value = (verdict && verdict.until) || day(SNOOZE);
    const why = el("input", { id: "why", maxlength: 1000, autocomplete: "off", placeholder: "optional" });
    why.value = (verdict && verdict.why) || "";
    why.addEventListener("change", () => {
      const now = verdictOf(row);
      if (now) keep(keyOf(example[row]), { ...now, why: why.value });
    });
    const buttons = Object.keys(VERDICTS).filter((one) => one !== "relabel" || label);
    return el("div", { id: "verdict", role: "group", "aria-label": "Verdict" },
      ...buttons.map(button),
      el("button", { type: "button", text: "undo", onclick: undo, "aria-keyshortcuts": "U" }, el("kbd", { text: "U", "aria-hidden": "true" })),
      el("div", { class: "break" }),
      label ? el("label", {}, "New label ", label) : null,
      el("label", {}, "Snooze until ", until),
      el("label", {}, "Why ", why));
  }

  function say(text) {
    $("progress").textContent = text;
  }

  // ---- Keys and controls

  const KEYS = {
    n: () => step(1), p: () => step(-1),
    k: () => judge("keep"), r: () => judge("relabel"), d: () => judge("drop"), s: () => judge("snooze"),
    u: undo, e: exportVerdicts,
    l: () => $("label") && $("label").focus(), w: () => $("why") && $("why").focus(),
    "/": () => $("search").focus(),
    ArrowDown: () => step(1), ArrowUp: () => step(-1),
    PageDown: () => step(8), PageUp: () => step(-8),
    Home: () => step(-count), End: () => step(count),
    Enter: () => open(true), Escape: () => open(false),
  };
  const SCROLLS = /^(Arrow|Page|Home|End|Enter)/;

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const at = event.target;
    if (at.matches("input:not([type=checkbox]), select")) {
      if (event.key === "Escape" || (event.key === "Enter" && at.matches("#why, #search, #label, #until, #who"))) {
        at.blur();
        $("list").focus({ preventScroll: true });
        event.preventDefault();
      }
      return;
    }
    const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (!Object.hasOwn(KEYS, name)) return;
    if (event.repeat && /^[krdsu]$/.test(name)) return;
    const inList = at === document.body || at === $("reverse") || $("list").contains(at);
    if (SCROLLS.test(name) && !inList) return;
    event.preventDefault();
    KEYS[name]();
  });

  $("list").addEventListener("scroll", () => requestAnimationFrame(() => renderRows(false)));
  addEventListener("resize", () => renderRows(true));
  let waiting = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(search, 30);
  });
  $("sort").append(el("option", { value: "", text: "order of the night" }),
    ...header.signals.map((signal) => el("option", { value: signal.name, text: words(signal.name) })));
  $("sort").addEventListener("change", sort);
  $("reverse").addEventListener("change", sort);
  $("clear").addEventListener("click", () => {
    for (const one of choosers.values()) one.reset();
    $("search").value = "";
    for (const name of Object.keys(filters)) {
      delete filters[name];
      apply(name);
    }
    refresh();
  });
  $("export").addEventListener("click", exportVerdicts);
  $("forget").addEventListener("click", forget);
  const NAME = "tracin-beam name";
  try {
    $("who").value = localStorage.getItem(NAME) || "";
  } catch { /* said by readVerdicts */ }
  $("who").addEventListener("change", () => {
    try {
      localStorage.setItem(NAME, $("who").value);
    } catch { /* the same */ }
  });

  readVerdicts();
  document.querySelector("main").hidden = false;
  refresh();
  progress();
  $("list").focus({ preventScroll: true });
  performance.mark("usable");
  contents = await unpack("contents");
  texts = null;
  renderRows(true);
  renderDetail();
  performance.mark("contents");
})().catch((error) => {
  const said = document.getElementById("trouble");
  said.textContent = `This page does not work in this browser (${error}). It needs a current one.`;
  said.hidden = false;
});
