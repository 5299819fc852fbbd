// The web page in a real browser: what people do, what they are refused, what they may not be
// hurt by. One server for all of it; every test makes the tasks it needs.
import assert from "node:assert/strict";
import { execFile, spawn } from "node:child_process";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { after, before, test } from "node:test";
import { promisify } from "node:util";
import { chromium } from "playwright-core";

const run = promisify(execFile);
const root = path.resolve(import.meta.dirname, "../..");
const bin = path.resolve(root, process.env.TASKER_BIN || "target/debug/tasker");
const axe = fs.readFileSync(path.join(import.meta.dirname, "node_modules/axe-core/axe.min.js"), "utf8");
const images = process.env.IMAGES ? path.join(root, "docs/images") : undefined;

let home, up, link, base, browser, admin, env;

const tasker = async (...args) => (await run(bin, args, { env, maxBuffer: 1 << 26 })).stdout.trim();
const submit = (template, input = {}, ...more) => tasker("task", "submit", template, "--input", JSON.stringify(input), ...more);
const sql = async (text) => (await run("psql", ["-X", "-A", "-t", "-c", text, await tasker("db", "url")])).stdout.trim();

const template = async (text) => {
  const file = path.join(home, `t${Math.random()}.yaml`);
  fs.writeFileSync(file, text);
  await tasker("template", "apply", file);
};

/** A browser of its own, signed in by a key if one is given. */
const visitor = async (options = {}, key = undefined) => {
  const context = await browser.newContext({ viewport: { width: 1440, height: 900 }, baseURL: base, ...options });
  if (key) {
    const page = await context.newPage();
    await page.goto("/login");
    await page.fill("#key", key);
    await page.click("main button");
    await page.waitForURL((url) => url.pathname === "/");
    await page.close();
  }
  return context;
};
const keyOf = async (...args) => {
  const out = JSON.parse(await tasker("-o", "json", "key", "create", `k${Math.random()}`.replace(".", ""), ...args));
  return out.key ?? out.secret ?? out.token;
};
const open = async (where, context = admin) => {
  const page = await context.newPage();
  page.errors = [];
  page.on("pageerror", (error) => page.errors.push(String(error)));
  page.on("console", (line) => line.type() === "error" && /Content Security Policy/.test(line.text()) && page.errors.push(line.text()));
  await page.goto(where);
  return page;
};
const status = (page, word) => page.locator("#head .pill", { hasText: word }).first().waitFor({ timeout: 60_000 });

before(async () => {
  home = fs.mkdtempSync(path.join(os.tmpdir(), "tasker-page-"));
  fs.chmodSync(home, 0o755);
  env = { ...process.env, TASKER_HOME: path.join(home, "data"), TASKER_LISTEN: "127.0.0.1:0" };
  delete env.DATABASE_URL;
  up = spawn(bin, ["up"], { env, stdio: ["ignore", "inherit", "pipe"] });
  let said = "";
  link = await new Promise((done, failed) => {
    up.stderr.on("data", (bytes) => {
      said += bytes;
      const found = said.match(/open\s+(http\S+)/);
      if (found && /^running/m.test(said)) done(found[1]);
    });
    up.on("exit", (code) => failed(new Error(`tasker up ended with ${code}:\n${said}`)));
  });
  base = new URL(link).origin;
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: ["--no-sandbox"] });
  await template(`
namespace: shop
name: parcel
version: "1"
description: "Weighs <b>and</b> stamps"
input_schema:
  type: object
  required: [parcel_id, weight_kg]
  properties:
    parcel_id: {type: string, description: "What is printed on it"}
    weight_kg: {type: number}
    size: {enum: [small, large]}
steps:
  - {name: weigh, handler: noop}
  - {name: stamp, handler: echo, depends_on: [weigh]}
`);
  await template(`
namespace: shop
name: lonely
version: "1"
steps:
  - {name: weigh, handler: noop}
  - {name: stamp, handler: nobody.has_it, depends_on: [weigh]}
`);
  await template(`
namespace: shop
name: approve
version: "1"
steps:
  - {name: quote, handler: noop}
  - {name: approval, wait: {signal: decided, allowed: [approve, reject]}, depends_on: [quote]}
  - {name: act, handler: echo, depends_on: [approval], input: {answer: "\${steps.approval.output.answer}"}}
`);
  await template(`
namespace: shop
name: broken
version: "1"
steps:
  - {name: first, handler: noop}
  - {name: fails, handler: fail, depends_on: [first], input: {permanent: true}}
`);
  await template(`
namespace: shop
name: slow
version: "1"
steps:
  - {name: rest, wait: {sleep: 2s}}
  - {name: then, handler: noop, depends_on: [rest]}
`);
  await template(`
namespace: other
name: secret
version: "1"
steps:
  - {name: only, handler: noop}
`);
});

after(async () => {
  await browser?.close();
  if (up && up.exitCode === null) {
    const ended = new Promise((done) => up.on("exit", done));
    up.kill("SIGINT");
    await ended;
  }
  await run(bin, ["db", "stop"], { env }).catch(() => {});
  fs.rmSync(home, { recursive: true, force: true });
});

test("the link of `tasker up` signs in one browser, once", async () => {
  admin = await visitor();
  const page = await open(link);
  assert.equal(new URL(page.url()).pathname, "/");
  await page.getByRole("heading", { name: "Tasks", exact: true }).waitFor();
  await page.close();
  const second = await visitor();
  const late = await open(link, second);
  assert.match(await late.textContent("main"), /used, or is too old/);
  await second.close();
});

test("who has not signed in sees the sign-in page, and a wrong key is refused in words", async () => {
  const stranger = await visitor();
  for (const where of ["/", "/queues", "/templates", "/settings", "/tasks/00000000-0000-0000-0000-000000000000"]) {
    const page = await open(where, stranger);
    assert.equal(new URL(page.url()).pathname, "/login", where);
    await page.close();
  }
  const page = await open("/login", stranger);
  await page.fill("#key", "tsk_nonsense");
  await page.click("main button");
  await page.getByRole("alert").waitFor();
  assert.match(await page.getByRole("alert").textContent(), /unknown, expired or revoked/);
  await stranger.close();
});

test("a viewer sees no payload, is offered no act, and is refused one", async () => {
  const task = await submit("shop/parcel", { parcel_id: "P-HIDDEN-1", weight_kg: 1 });
  const viewer = await visitor({}, await keyOf("--role", "viewer"));
  const page = await open(`/tasks/${task}`, viewer);
  assert.equal(await page.getByText("Actions").count(), 0);
  const text = await page.textContent("main");
  assert.ok(!text.includes("P-HIDDEN-1") && text.includes("payloads:read"));
  assert.equal(await page.getByRole("link", { name: "Audit" }).count(), 0);
  const csrf = await page.locator("input[name=csrf]").first().inputValue();
  const answer = await page.evaluate(async ([where, csrf]) => {
    const body = new URLSearchParams({ csrf, action: "cancel" });
    return (await fetch(where, { method: "POST", body })).status;
  }, [`/tasks/${task}/act`, csrf]);
  assert.equal(answer, 403);
  await viewer.close();
});

test("a key of one namespace does not learn of another", async () => {
  const theirs = await submit("other/secret", {}, "--correlation-id", "not-yours");
  const ours = await submit("shop/parcel", { parcel_id: "P", weight_kg: 1 }, "--correlation-id", "ours");
  const shop = await visitor({}, await keyOf("--role", "operator", "--namespace", "shop"));
  const page = await open(`/tasks/${theirs}`, shop);
  assert.match(await page.textContent("main"), /There is no such thing/);
  for (const where of ["/", "/search?q=not-yours", "/templates", "/queues"]) {
    await page.goto(where);
    const said = (await page.textContent("main")).replace("not-yours”", "");
    assert.ok(!/not-yours|secret|worker_other/.test(said), `${where}: ${said}`);
  }
  await page.goto(`/tasks/${ours}`);
  await status(page, "completed");
  await shop.close();
});

test("a form without this session's token is refused", async () => {
  const task = await submit("shop/approve");
  const page = await open("/");
  const answer = await page.evaluate(async (where) => {
    const body = new URLSearchParams({ csrf: "0".repeat(32), action: "cancel" });
    return (await fetch(where, { method: "POST", body })).status;
  }, `/tasks/${task}/act`);
  assert.equal(answer, 403);
  await page.goto(`/tasks/${task}`);
  await status(page, "waiting");
  await page.close();
});

test("a task is submitted by its form, and found by id, correlation id and idempotency key", async () => {
  const page = await open("/templates/shop/parcel");
  await page.fill("#in-parcel_id", "P-7");
  await page.fill("#in-weight_kg", "2.5");
  await page.selectOption("#in-size", "large");
  await page.getByText("Correlation id, key, priority").click();
  await page.fill("#correlation_id", "parcel 7");
  await page.fill("#idempotency_key", "key-7");
  await page.getByRole("button", { name: "Submit", exact: true }).click();
  await status(page, "completed");
  const task = new URL(page.url()).pathname.split("/").pop();
  assert.match(await page.textContent("#json-input"), /"weight_kg": 2.5/);
  for (const word of [task, "parcel 7", "key-7"]) {
    // From another page: on the task's own there would be nothing to wait for.
    await page.goto("/");
    await page.keyboard.press("/");
    await page.fill("#search", word);
    await page.keyboard.press("Enter");
    await page.waitForURL((url) => url.pathname === `/tasks/${task}`);
  }
  assert.deepEqual(page.errors, []);
  await page.close();
});

test("a refused input names the field", async () => {
  const page = await open("/templates/shop/parcel");
  await page.getByText("The whole input as JSON").first().click();
  await page.fill("#whole", '{"parcel_id": 7}');
  await page.evaluate(() => document.querySelector("#submit form").noValidate = true);
  await page.getByRole("button", { name: "Submit", exact: true }).click();
  await page.getByRole("heading", { name: /rule|invalid/i }).waitFor();
  assert.match(await page.textContent("main"), /input/);
  await page.close();
});

test("a task is watched without reloading, and the pause holds it still", async () => {
  const page = await open("/");
  await page.locator('button[data-live]:not([data-state="off"])').waitFor();
  const task = await submit("shop/slow");
  await page.locator(`tr[data-key="${task}"]`).waitFor({ timeout: 60_000 });
  await page.locator(`tr[data-key="${task}"] .pill`, { hasText: "completed" }).waitFor({ timeout: 60_000 });
  await page.keyboard.press("p");
  const unseen = await submit("shop/parcel", { parcel_id: "P", weight_kg: 1 });
  await page.waitForTimeout(2500);
  assert.equal(await page.locator(`tr[data-key="${unseen}"]`).count(), 0);
  assert.equal(await page.locator("button[data-live]").getAttribute("data-state"), "paused");
  await page.keyboard.press("p");
  await page.locator(`tr[data-key="${unseen}"]`).waitFor({ timeout: 60_000 });
  // What was read anew has not put the button back to how the server wrote it.
  assert.equal(await page.locator("button[data-live]").getAttribute("data-state"), "live");
  assert.deepEqual(page.errors, []);
  await page.close();
});

test("filters are in the address", async () => {
  await submit("shop/broken", {}, "--correlation-id", "to-filter");
  const page = await open("/");
  await page.locator(".chips a", { hasText: "failed" }).click();
  await page.waitForURL(/status=failed/);
  await page.locator("#list tbody tr").first().waitFor({ timeout: 60_000 });
  for (const pill of await page.locator("#list tbody .pill").allTextContents()) assert.match(pill, /failed/);
  await page.getByText("Filter", { exact: true }).click();
  await page.fill("input[name=correlation_id]", "nothing has this");
  await page.getByRole("button", { name: "Apply" }).click();
  await page.getByText("No task matches").waitFor();
  await page.goto("/?correlation_id=to-filter");
  await page.locator("#list tbody tr").first().waitFor({ timeout: 60_000 });
  assert.equal(await page.locator("#list tbody tr").count(), 1);
  await page.close();
});

test("a task is cancelled, retried, and rerun from a step", async () => {
  const cancelled = await submit("shop/approve");
  let page = await open(`/tasks/${cancelled}`);
  await page.getByText("Actions").click();
  await page.fill("#reason", "not wanted");
  await page.getByRole("button", { name: "Cancel", exact: true }).click();
  await status(page, "cancelled");
  assert.match(await page.textContent("#head .reason"), /not wanted/);
  await page.close();

  const failed = await submit("shop/broken");
  page = await open(`/tasks/${failed}`);
  await status(page, "failed");
  await page.getByText("Actions").click();
  await page.getByRole("button", { name: "Retry", exact: true }).click();
  await page.locator("#head", { hasText: "run 2" }).waitFor({ timeout: 60_000 });
  await page.close();

  const done = await submit("shop/parcel", { parcel_id: "P", weight_kg: 1 });
  page = await open(`/tasks/${done}`);
  await status(page, "completed");
  await page.locator("#steps a", { hasText: "stamp" }).click();
  await page.getByText("Actions").click();
  await page.getByRole("button", { name: "Rerun from here" }).click();
  await page.locator("#head", { hasText: "run 2" }).waitFor({ timeout: 60_000 });
  await status(page, "completed");
  await page.goto(`/audit?task=${done}`);
  assert.match(await page.textContent("main tbody"), /rerun/);
  await page.close();
});

test("a waiting step is approved", async () => {
  const task = await submit("shop/approve");
  const page = await open(`/tasks/${task}`);
  await page.getByRole("button", { name: "approve", exact: true }).click({ timeout: 60_000 });
  await status(page, "completed");
  await page.locator("#steps a", { hasText: "act" }).click();
  await page.locator("#json-output").waitFor();
  assert.match(await page.textContent("#json-output"), /"answer": "approve"/);
  assert.deepEqual(page.errors, []);
  await page.close();
});

test("a page that is not there is a page, and a program is told as before", async () => {
  const page = await open("/nowhere");
  await page.getByRole("heading", { name: "There is no such page" }).waitFor();
  const answer = await page.request.get("/nowhere", { headers: { accept: "*/*" } });
  assert.equal(answer.status(), 404);
  assert.equal((await answer.json()).code, "not_found");
  await page.close();
});

test("a suspended task says who suspended it and why; a step that waits offers its answers", async () => {
  const task = await submit("shop/approve");
  const page = await open(`/tasks/${task}`);
  await status(page, "waiting");
  await page.locator("#steps a", { hasText: "approval" }).click();
  await page.getByRole("button", { name: "reject", exact: true }).waitFor();
  await page.goBack();
  await tasker("task", "suspend", task, "--reason", "the customer asked us to wait");
  await status(page, "suspended");
  assert.match(await page.textContent("#head .reason"), /suspended by \S+: the customer asked us to wait/);
  await page.close();
});

test("what changed between two schemas is told rule by rule, and no secret of them is", async () => {
  for (const [version, rules] of [["1", "default: hunter2"], ["2", "default: hunter3, minLength: 8"]]) {
    await template(`{namespace: shop, name: secretive, version: "${version}", input_schema: {required: [password], properties: {password: {type: string, ${rules}}}}, steps: [{name: a, handler: noop}]}`);
  }
  const page = await open("/templates/shop/secretive?version=2&since=1");
  const said = await page.textContent("#diff pre");
  assert.match(said, /password\.default: changed, and hidden\n/);
  assert.match(said, /password\.minLength: none → 8\n/);
  assert.ok(!/hunter/.test(await page.content()));
  assert.equal(await page.inputValue("#in-password"), "");
  const answer = await page.request.get("/v1/templates/shop/secretive/diff?before=1&after=2", { headers: { authorization: `Bearer ${await keyOf("--role", "viewer")}` } });
  assert.deepEqual((await answer.json()).template, [
    { key: "input_schema.properties.password.default", before: "[redacted]", after: "[redacted]" },
    { key: "input_schema.properties.password.minLength", before: null, after: 8 },
  ]);
  const told = await tasker("template", "diff", "shop/secretive", "1", "2");
  assert.ok(/minLength: none → 8/.test(told) && !/hunter/.test(told), told);
  await page.close();
});

test("many tasks are acted on after a preview", async () => {
  const tasks = [await submit("shop/approve", {}, "--correlation-id", "bulk"), await submit("shop/approve", {}, "--correlation-id", "bulk"),
    await submit("shop/parcel", { parcel_id: "P", weight_kg: 1 }, "--correlation-id", "bulk")];
  const page = await open("/?correlation_id=bulk");
  for (const [i, word] of ["waiting", "waiting", "completed"].entries()) {
    await page.locator(`tr[data-key="${tasks[i]}"] .pill`, { hasText: word }).waitFor({ timeout: 60_000 });
  }
  await page.check("#pick-all");
  await page.selectOption("select[name=action]", "cancel");
  await page.getByRole("button", { name: "Preview" }).click();
  await page.getByText(/2 of 3 tasks would be asked to cancel; nothing has happened yet/).waitFor();
  await page.getByRole("button", { name: /Cancel 2 tasks/ }).click();
  await page.getByText(/2 tasks were asked to cancel/).waitFor();
  await page.goto("/?correlation_id=bulk&status=cancelled");
  await page.locator(`tr[data-key="${tasks[0]}"]`).waitFor({ timeout: 60_000 });
  await page.close();
});

test("a handler that nobody offers is said loudly, on the task and on the queues", async () => {
  const task = await submit("shop/lonely");
  const page = await open(`/tasks/${task}`);
  await page.getByRole("alert").filter({ hasText: "nobody.has_it" }).waitFor({ timeout: 60_000 });
  await page.goto("/queues");
  await page.getByRole("alert").filter({ hasText: "nobody.has_it" }).waitFor({ timeout: 60_000 });
  await page.close();
});

test("a bad message is looked at and discarded", async () => {
  await sql("select pgmq.send('task_requests', '{\"v\": 99, \"type\": \"<b>nonsense</b>\"}')");
  const page = await open("/queues");
  await page.locator("#quarantine a", { hasText: "Look" }).first().click({ timeout: 60_000 });
  assert.match(await page.textContent("#json-message"), /<b>nonsense<\/b>/);
  await page.getByRole("button", { name: "Discard" }).click();
  await page.getByText("has left the quarantine").waitFor();
  await page.close();
});

test("the timeline has a row for each step, zooms by keys, and shows the same trace without a script", async () => {
  const task = await submit("shop/parcel", { parcel_id: "P", weight_kg: 1 });
  const page = await open(`/tasks/${task}`);
  await status(page, "completed");
  await page.reload();
  await page.locator(".tl-view .tl-row").first().waitFor();
  assert.equal(await page.locator(".tl-view .tl-row").count(), 3);
  const axis = () => page.textContent(".tl-ends");
  const whole = await axis();
  await page.focus("#timeline");
  await page.keyboard.press("+");
  assert.notEqual(await axis(), whole);
  await page.keyboard.press("0");
  assert.equal(await axis(), whole);
  await page.close();
  const plain = await visitor({ javaScriptEnabled: false, storageState: await admin.storageState() });
  const still = await open(`/tasks/${task}`, plain);
  assert.equal(await still.locator(".tl-row").count(), 3);
  assert.match(await still.textContent("main"), /completed/);
  await plain.close();
});

test("the log is downloaded as CSV and as JSON", async () => {
  const task = await submit("shop/parcel", { parcel_id: "P", weight_kg: 1 });
  const page = await open(`/tasks/${task}`);
  await status(page, "completed");
  const [csv, json] = await page.evaluate((task) => Promise.all(["csv", "json"].map((kind) => fetch(`/tasks/${task}/log.${kind}`).then((a) => a.text()))), task);
  assert.equal(csv.trim().split("\r\n").length - 1, JSON.parse(json).length);
  await page.close();
});

const everyPage = async () => {
  const task = await submit("shop/approve", {}, "--correlation-id", "every page");
  const lonely = await submit("shop/lonely");
  const failed = await submit("shop/broken");
  for (const steps of ["[{name: a, handler: noop}]", "[{name: a, handler: echo}, {name: b, handler: noop, depends_on: [a]}]"]) {
    await template(`{namespace: shop, name: grown, version: "${steps.length}", steps: ${steps}}`);
  }
  await template(`
namespace: shop
name: each
version: "1"
steps:
  - {name: all, handler: echo, input: {items: "\${input.items}"}}
  - {name: one, handler: noop, for_each: "\${steps.all.output.items}", depends_on: [all]}
`);
  const map = await submit("shop/each", { items: [1, 2, 3] });
  await template(`{namespace: shop, name: login, version: "1", input_schema: {properties: {password: {type: string, default: hunter2}}}, steps: [{name: a, handler: noop}]}`);
  await template(`{namespace: shop, name: login, version: "2", input_schema: {properties: {password: {type: string, default: hunter3, minLength: 8}}}, steps: [{name: a, handler: noop}]}`);
  const suspended = await submit("shop/slow");
  await tasker("task", "suspend", suspended, "--reason", "the customer asked us to wait");
  await tasker("schedule", "set", "shop/rests", "--template", "lonely", "--every", "1h");
  await tasker("schedule", "pause", "shop/rests");
  await tasker("limit", "set", "shop", "--concurrency", "90");
  await tasker("retention", "set", "--namespace", "shop", "--keep", "30d");
  await tasker("queue", "pause", "worker_other", "--reason", "a machine is mended");
  await tasker("schedule", "set", "shop/nightly", "--template", "lonely", "--cron", "0 3 * * *", "--time-zone", "Europe/Berlin");
  await sql("select pgmq.send('task_requests', '{\"v\": 99}')");
  const page = await open(`/tasks/${failed}`);
  await status(page, "failed");
  const step = await page.locator("#steps a", { hasText: "fails" }).getAttribute("href");
  await page.goto(`/tasks/${map}`);
  await status(page, "completed");
  const mapStep = await page.locator("#steps a", { hasText: "one" }).getAttribute("href");
  await tells(map);
  const told = await page.locator("#steps a", { hasText: "all" }).getAttribute("href");
  await page.goto("/queues");
  const quarantined = await page.locator("#quarantine a").first().getAttribute("href", { timeout: 60_000 });
  const waiting = `/tasks/${task}`;
  await page.goto(waiting);
  const approval = await page.locator("#steps a", { hasText: "approval" }).getAttribute("href");
  await page.close();
  // States that no address leads to. On a phone the box that picks all is for keys alone.
  const pickAll = (page) => page.locator("#pick-all").evaluate((box) => box.click());
  const click = (where, ...names) => async (page) => {
    await page.goto(where);
    for (const name of names) await page.locator("summary, button", { hasText: new RegExp(`^\\s*${name}`) }).first().click();
  };
  const bulk = async (page, task, ...more) => {
    await page.goto("/?correlation_id=every+page");
    // Only a task that is there can be picked, and only one that runs can be suspended.
    if (task) await page.locator(`tr[data-key="${task}"] .pill`, { hasText: "waiting" }).waitFor({ timeout: 60_000 });
    await pickAll(page);
    await page.selectOption("select[name=action]", "suspend");
    await page.getByRole("button", { name: "Preview" }).click();
    await page.getByRole("heading", { name: /^Preview/ }).waitFor();
    for (const name of more) await page.getByRole("button", { name }).click();
  };
  const refused = async (page) => {
    await page.goto("/templates/shop/parcel");
    await page.evaluate(() => document.querySelector("#submit form").noValidate = true);
    await page.getByRole("button", { name: "Submit", exact: true }).click();
    await page.getByRole("heading", { name: /rule/ }).waitFor();
  };
  const states = {
    "picked rows": async (page) => { await page.goto("/"); await pickAll(page); },
    "the preview of a bulk act": (page) => bulk(page), "a bulk act": async (page) => bulk(page, await submit("shop/approve", {}, "--correlation-id", "every page"), /^Suspend \d+ task/),
    "the filter": click("/", "Filter"), "the actions of a task": click(waiting, "Actions"), "the actions of a failed task": click(`/tasks/${failed}`, "Actions"),
    "the actions of a step": click(approval, "Actions"), "the span of a step": click(told, "Its span"), "the whole error": click(step, "The whole error"),
    "a form that is open": click("/templates/shop/parcel", "The whole input", "Correlation id"), "a refused form": refused, "paused": click("/", "Live"),
    "what was requeued": (page) => page.goto("/queues?done=quarantine"), "a used link": (page) => page.goto(new URL(link).pathname + new URL(link).search),
  };
  return [...Object.entries(states), approval, `/tasks/${suspended}`, "/templates/shop/login?since=1", "/templates/shop/login", "/nowhere", "/templates/shop/nothing", "/audit?actor=nobody", "/", "/?status=failed", "/?correlation_id=nothing+has+this", "/search?q=nothing", "/search?q=every+page", `/tasks/${task}`, `/tasks/${lonely}`, `/tasks/${failed}`, step, mapStep, told,
    `/tasks/${failed}/log`, "/queues", quarantined, "/templates", "/templates/shop/parcel", "/templates/shop/grown?since=26", "/schedules", "/audit", "/settings",
    "/tasks/00000000-0000-0000-0000-000000000000", "/?status=nonsense"];
};

/** As if the handlers of a task had told all that one can tell. */
const tells = (task, word = "invoice", uri = "https://files.example/4711.pdf") => sql(`
  update tasker.attempts set usage = jsonb_build_object($x$${word}$x$, 1200, 'gen_ai.usage.output_tokens', 340), milestones = jsonb_build_array(
    jsonb_build_object('name', $x$${word}$x$, 'at_ms', 12.5, 'attributes', jsonb_build_object($x$${word}$x$, $x$${word}$x$)),
    jsonb_build_object('name', 'artifact', 'at_ms', 20, 'attributes', jsonb_build_object('artifact.name', $x$${word}$x$, 'artifact.uri', $x$${uri}$x$, 'artifact.size', 48211)))
  where task_uuid = '${task}' and attempt > 0`);

test("a step shows what its handler told: milestones, artifacts, usage, and its span", async () => {
  const task = await submit("shop/parcel", { parcel_id: "P", weight_kg: 1 });
  const page = await open(`/tasks/${task}`);
  await status(page, "completed");
  await tells(task);
  await page.locator("#steps a", { hasText: "weigh" }).click();
  const told = page.locator("#reported");
  await told.getByRole("link", { name: "https://files.example/4711.pdf" }).waitFor();
  assert.match(await told.textContent(), /48,211 bytes/);
  assert.match(await told.locator("table").textContent(), /12(\.5)? ms.*invoice/);
  assert.match(await told.locator("svg.usage").getAttribute("aria-label"), /invoice: 1200; .*output_tokens: 340|output_tokens: 340; .*invoice: 1200/);
  await page.getByText(/Its span: \d+ attributes/).click();
  assert.match(await page.textContent("#step"), /handler\.execution/);
  const viewer = await visitor({}, await keyOf("--role", "viewer"));
  const theirs = await open(new URL(page.url()).pathname, viewer);
  assert.ok(!/4711\.pdf/.test(await theirs.textContent("main")));
  await viewer.close();
  await page.close();
});

test("a viewer learns the type of an error, never what it says", async () => {
  await template(`{namespace: shop, name: leaky, version: "1", steps: [{name: only, handler: http, input: {url: "http://card-4242.invalid/"}, retry: {max_attempts: 1}}]}`);
  const task = await submit("shop/leaky");
  const page = await open(`/tasks/${task}`);
  await status(page, "failed");
  const step = await page.locator("#steps a", { hasText: "only" }).getAttribute("href");
  const said = await page.evaluate(async (where) => (await fetch(where)).text(), `/tasks/${task}/timeline.json`);
  assert.match(said, /card-4242/);
  const viewer = await visitor({}, await keyOf("--role", "viewer"));
  for (const where of [`/tasks/${task}/timeline.json`, `/tasks/${task}/log`, `/tasks/${task}/log.csv`, `/tasks/${task}/log.json`, step]) {
    const answer = await viewer.request.get(where);
    assert.equal(answer.status(), 200, where);
    assert.ok(!/card-4242/.test(await answer.text()), where);
  }
  await viewer.close();
  await page.close();
});

test("axe finds nothing serious, in light and dark, wide and on a phone; no page is wider than a phone", async () => {
  const pages = await everyPage();
  const found = [];
  for (const [colorScheme, width] of [["light", 1440], ["dark", 1440], ["light", 390], ["dark", 390]]) {
    const context = await visitor({ colorScheme, viewport: { width, height: 844 }, storageState: await admin.storageState(), bypassCSP: true });
    for (const where of [...pages, "/login"]) {
      const [name, go] = typeof where === "string" ? [where] : where;
      const page = await open(go ? "/settings" : where, context);
      if (go) await go(page);
      await page.evaluate(axe);
      const { violations } = await page.evaluate(() => axe.run(document, { resultTypes: ["violations"] }));
      for (const one of violations.filter((one) => ["serious", "critical"].includes(one.impact))) {
        found.push(`${name} (${colorScheme}, ${width}): ${one.id}: ${one.nodes.slice(0, 3).map((node) => node.html.slice(0, 160)).join(" | ")}`);
      }
      const over = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
      if (over > 0) found.push(`${name} (${width}) is ${over} px too wide`);
      await page.close();
    }
    await context.close();
  }
  assert.deepEqual(found, []);
});

test("text of users is text on every page", async () => {
  const evil = `"'><img src=x onerror="window.hurt=1"><script>window.hurt=1</script>\${7*7}{{7*7}}`;
  await template(`
namespace: shop
name: evil
version: "v</script><script>window.hurt=1</script>"
description: ${JSON.stringify(evil)}
input_schema: {type: object, title: ${JSON.stringify(evil)}, properties: {"<img src=x onerror=window.hurt=1>": {type: string, description: ${JSON.stringify(evil)}, default: ${JSON.stringify(evil)}, enum: [${JSON.stringify(evil)}]}}}
steps:
  - {name: first, handler: echo, input: {all: "\${input}"}}
  - {name: ask, wait: {signal: ok}, depends_on: [first]}
`);
  const task = await submit("shop/evil", { text: evil }, "--correlation-id", evil.slice(0, 190), "--idempotency-key", `${evil.slice(0, 180)}1`);
  await sql(`select tasker.suspend_task('${task}', $x$${evil}$x$, $x$${evil}$x$)`);
  await sql(`select pgmq.send('task_requests', jsonb_build_object('v', 99, 'type', $x$${evil}$x$))`);
  const failed = await submit("shop/broken", {}, "--correlation-id", "evil words");
  await tasker("key", "create", evil.slice(0, 90), "--role", "viewer");
  await tasker("limit", "set", "shop", "--handler", "nobody.has_it", "--concurrency", "7", "--reason", evil);
  await sql(`select tasker.worker_hello($x$${evil}$x$, 'shop', '{worker_shop}', array[$x$${evil}$x$], 1)`);
  const page = await open(`/tasks/${task}`);
  const step = await page.locator("#steps a").first().getAttribute("href", { timeout: 60_000 });
  await page.goto("/queues");
  const quarantined = await page.locator("#quarantine a").first().getAttribute("href", { timeout: 60_000 });
  await page.goto(`/tasks/${failed}`);
  await status(page, "failed");
  const broken = await page.locator("#steps a", { hasText: "fails" }).getAttribute("href");
  await tells(failed, evil, "javascript:window.hurt=1");
  await sql(`update tasker.attempts set error = jsonb_build_object('type', $x$${evil}$x$, 'message', $x$${evil}$x$), worker = $x$${evil}$x$, worker_version = $x$${evil}$x$ where task_uuid = '${failed}' and error is not null`);
  await sql(`update tasker.tasks set reason = $x$${evil}$x$, error_type = $x$${evil}$x$ where task_uuid = '${failed}'`);
  await sql(`update tasker.transitions set actor = $x$${evil}$x$, detail = jsonb_build_object('reason', $x$${evil}$x$, 'error_type', $x$${evil}$x$) where task_uuid = '${failed}' and to_state = 'error'`);
  const word = encodeURIComponent(evil);
  for (const where of [`/tasks/${failed}`, broken, `/tasks/${failed}/log`, "/?correlation_id=evil+words", "/schedules", "/login",`/tasks/${task}`, step, `/tasks/${task}/log`, "/", `/?correlation_id=${word}`, `/?template=${word}&namespace=${word}&error_type=${word}`,
    `/search?q=${word}`, "/queues", quarantined, "/templates", "/templates/shop/evil", `/templates/shop/evil?since=${word}&version=${word}`,
    `/audit?actor=${word}`, "/audit", "/settings", `/?status=${word}`, `/?done=${word}`, `/tasks/${word}`]) {
    await page.goto(where);
    await page.waitForTimeout(150);
    assert.equal(await page.evaluate(() => window.hurt), undefined, where);
    assert.equal(await page.locator("img, main script, [onerror]").count(), 0, where);
  }
  assert.deepEqual(page.errors.filter((error) => !/favicon/.test(error)), []);
  await page.close();
});

test("the first load is under 150 KB, and nothing comes from elsewhere", async () => {
  const context = await visitor({ storageState: await admin.storageState() });
  const page = await context.newPage();
  const cdp = await context.newCDPSession(page);
  await cdp.send("Network.enable");
  let bytes = 0;
  const hosts = new Set();
  cdp.on("Network.loadingFinished", (event) => { bytes += event.encodedDataLength; });
  page.on("request", (request) => hosts.add(new URL(request.url()).origin));
  await page.goto("/");
  await page.waitForTimeout(500);
  console.log(`first load: ${Math.round(bytes / 102.4) / 10} KB over the network`);
  assert.ok(bytes > 0 && bytes < 150 * 1024, `${bytes} bytes`);
  assert.deepEqual([...hosts], [base]);
  await context.close();
});

test("the example runs by one button", async () => {
  const page = await open("/");
  await page.getByRole("button", { name: /Run an example/ }).click();
  await status(page, "completed");
  assert.deepEqual(page.errors, []);
  await page.close();
});

/** A program of ours that runs until it is told to end, once it has said so. */
const start = async (args, own, ready) => {
  const child = spawn(bin, args, { env: own, stdio: ["ignore", "ignore", "pipe"] });
  let said = "";
  const found = await new Promise((done, failed) => {
    child.stderr.on("data", (bytes) => {
      said += bytes;
      const match = said.match(ready);
      if (match) done(match);
    });
    child.on("exit", (code) => failed(new Error(`tasker ${args.join(" ")} ended with ${code}:\n${said}`)));
  });
  const ended = new Promise((done) => child.on("exit", done));
  return { found, stop: async () => { child.kill("SIGINT"); await ended; } };
};

test("a newcomer starts it, runs the example, stops the worker, sees why it waits, starts it again and reads the trace", async () => {
  const own = { ...env, TASKER_HOME: path.join(home, "newcomer") };
  const server = await start(["up", "--no-example-worker"], own, /open\s+(http\S+)\nrunning/);
  const context = await browser.newContext({ viewport: { width: 1440, height: 900 } });
  let worker;
  try {
    const page = await open(server.found[1], context);
    const origin = new URL(page.url()).origin;
    const commands = new Set();
    for (const where of ["/login", "/queues", "/templates", "/schedules", "/settings", "/audit", "/"]) {
      await page.goto(origin + where);
      for (const line of await page.locator("pre code").allTextContents()) commands.add(line);
    }
    assert.ok(commands.size >= 6, [...commands].join("\n"));
    // What an empty page tells to type is a command that there is.
    for (const line of commands) if (line.startsWith("tasker ")) await run("sh", ["-c", `"${bin}" ${line.slice(7)} --help`], { env: own });
    await page.getByRole("button", { name: /Run an example/ }).first().click();

    // Nobody works yet: the page says so, and gives the exact command.
    const alarm = page.getByRole("alert").filter({ hasText: "No live worker offers the handler" });
    await alarm.waitFor({ timeout: 60_000 });
    const command = (await alarm.locator("code", { hasText: "tasker " }).textContent()).split(" ").slice(1);
    worker = await start(command, own, /offers the handlers/);
    const row = (name) => page.locator("#steps tbody tr", { has: page.getByRole("link", { name, exact: true }) });

    // It moves, by itself. Who is told to end finishes what runs, and starts nothing more.
    await row("validate").locator(".pill.running, .pill.complete").waitFor({ timeout: 60_000 });
    await worker.stop();
    await row("validate").locator(".pill.complete").waitFor({ timeout: 60_000 });
    await alarm.waitFor({ timeout: 60_000 });
    await page.locator("#head .reason", { hasText: "no worker offers it" }).waitFor({ timeout: 60_000 });
    assert.match(await page.textContent("#head .pill"), /waiting|running/);
    await page.goto(`${origin}/queues`);
    await page.getByRole("alert").filter({ hasText: /No (live )?worker/ }).filter({ hasText: command.join(" ") }).first().waitFor();
    await page.goBack();

    worker = await start(command, own, /offers the handlers/);
    await status(page, "completed");
    await alarm.waitFor({ state: "detached", timeout: 60_000 });

    // What happened, with what it waited for.
    await page.locator(".tl-view .tl-row", { hasText: "validate" }).waitFor();
    const told = await page.locator(".tl-view .tl-bars[aria-label]").evaluateAll((all) => all.map((one) => one.getAttribute("aria-label")).join("\n"));
    assert.match(told, /held back .*no worker offered its handler/);
    assert.match(told, /running .* on /);
    const show = (await page.locator("pre", { hasText: "tasker trace show" }).textContent()).trim().split(" ").slice(1);
    const { stdout: trace } = await run(bin, show, { env: own });
    assert.match(trace, /handler\.execution orders\.validate/);
    assert.deepEqual(page.errors, []);
  } finally {
    await context.close();
    await worker?.stop();
    await server.stop();
    await run(bin, ["db", "stop"], { env: own }).catch(() => {});
  }
});

test("under a path and read-only, every link stays below it and nothing can be changed", async () => {
  const other = spawn(bin, ["api", "run", "--listen", "127.0.0.1:0", "--base-path", "/tasks-here", "--read-only"], { env, stdio: ["ignore", "ignore", "pipe"] });
  let said = "";
  const once = await new Promise((done) => other.stderr.on("data", (bytes) => {
    said += bytes;
    const found = said.match(/open\s+(http\S+)/);
    if (found) done(found[1]);
  }));
  const context = await browser.newContext({ viewport: { width: 1440, height: 900 } });
  const page = await context.newPage();
  await page.goto(once);
  assert.equal(new URL(page.url()).pathname, "/tasks-here/");
  for (const where of ["", "queues", "templates", "templates/shop/parcel", "settings"]) {
    await page.goto(new URL(where, `${new URL(once).origin}/tasks-here/`).href);
    const links = await page.locator("a[href], link[href], script[src], form[action]").evaluateAll((all) => all.map((one) => one.getAttribute("href") ?? one.getAttribute("src") ?? one.getAttribute("action")));
    for (const to of links) assert.ok(to.startsWith("/tasks-here") || to.startsWith("#") || to.startsWith("http"), `${where}: ${to}`);
    assert.equal(await page.locator("main form[method=post] button").count(), 0, where);
  }
  const csrf = await page.locator("input[name=csrf]").first().inputValue();
  const answer = await page.evaluate(async (csrf) => (await fetch("/tasks-here/bulk", { method: "POST", body: new URLSearchParams({ csrf, action: "cancel" }) })).status, csrf);
  assert.equal(answer, 403);
  await context.close();
  const ended = new Promise((done) => other.on("exit", done));
  other.kill("SIGINT");
  await ended;
});

test("light or dark is chosen by a button and kept", async () => {
  const context = await visitor({ storageState: await admin.storageState(), colorScheme: "light" });
  const page = await open("/settings", context);
  await page.getByRole("button", { name: /light and dark/ }).click();
  assert.equal(await page.evaluate(() => document.documentElement.dataset.theme), "dark");
  await page.reload();
  assert.equal(await page.evaluate(() => document.documentElement.dataset.theme), "dark");
  await context.close();
});

test("everything is reached by keys", async () => {
  await submit("shop/parcel", { parcel_id: "P", weight_kg: 1 });
  const page = await open("/");
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => document.activeElement.className), "skip");
  await page.keyboard.press("j");
  assert.ok(await page.evaluate(() => document.activeElement.matches("[data-row]")));
  await page.keyboard.press("Enter");
  await page.waitForURL(/\/tasks\//);
  await page.close();
});

// Pictures for docs/reference/web.md, of what the tests above have left and of examples.
test("pictures for the guide", { skip: !images }, async () => {
  fs.mkdirSync(images, { recursive: true });
  const page = await open("/");
  await page.getByRole("button", { name: /Run an example/ }).click();
  await status(page, "completed");
  const order = new URL(page.url()).pathname;
  await page.close();
  const lonely = await submit("shop/lonely", {}, "--correlation-id", "parcel 4711");
  const pictures = [
    ["tasks", "/", "light", 1200, 760], ["task", order, "light", 1200, 900], ["waiting", `/tasks/${lonely}`, "light", 1200, 560],
    ["queues", "/queues", "light", 1200, 620], ["task-dark", order, "dark", 1200, 760], ["phone", order, "light", 390, 844],
  ];
  for (const [name, where, colorScheme, width, height] of pictures) {
    const context = await visitor({ colorScheme, viewport: { width, height }, storageState: await admin.storageState() });
    const shown = await open(where, context);
    await shown.waitForTimeout(1500);
    await shown.screenshot({ path: path.join(images, `web-${name}.png`) });
    await context.close();
  }
});
