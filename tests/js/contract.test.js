// What page and Python have to agree on; `tests/web/test_page.py` tells Python's side.
import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";
import { formValues } from "../../mochi_app/web/page/form.js";
import { FILTERS } from "../../mochi_app/web/page/gallery.js";
import { connect, Refusal, server } from "../../mochi_app/web/page/server.js";
import { store } from "../../mochi_app/web/page/state.js";
import { job } from "./doubles.js";

const python = JSON.parse(process.env.MOCHI_PYTHON ?? "{}");
const known = { skip: !process.env.MOCHI_PYTHON && "only from tests/web/test_page.py" };

test("the filters are Python's, in its order", known, () => {
  assert.deepEqual(
    FILTERS.map(([name]) => name),
    python.filters,
  );
});

test("each call asks Python's function of its name", known, async () => {
  const asked = [];
  const functions = Object.fromEntries(
    python.calls.map((name) => [
      name,
      async () => {
        asked.push(name);
        return { ok: name };
      },
    ]),
  );
  connect(functions);
  for (const [name, call] of Object.entries(server)) assert.equal(await call("1"), name);
  assert.deepEqual(asked.sort(), [...python.calls].sort());
});

test("the form has a value for each field of Python's, and a job all details", known, () => {
  const values = formValues(job(), python.fields, true);
  assert.equal(values.length, python.fields.length);
  assert.ok(values.every((value) => value !== undefined));
  assert.ok(python.details.every(({ name }) => name in job()));
});

test("what the form is filled with is in the order of its fields", () => {
  const fields = ["steps", "random_seed", "seed"];
  assert.deepEqual(formValues(job({ steps: 8, seed: 5 }), fields, true), [8, false, "5"]);
});

test("without LoRAs on offer none is chosen", () => {
  const lora = (changes, offered) => formValues(job(changes), ["lora"], offered)[0];
  assert.equal(lora({ lora: "noir" }, true), "noir");
  assert.equal(lora({ lora: "noir" }, false), "");
  assert.equal(lora({}, true), "");
});

const gates = [];
store.on("gate", (gate) => gates.push(gate));

beforeEach(() => {
  gates.length = 0;
});

test("a refusal is told in the server's words", async () => {
  connect({ lineage: async () => ({ error: "no such job" }) });
  await assert.rejects(server.lineage("1"), (error) => {
    return error instanceof Refusal && error.message === "no such job";
  });
});

test("a server that is away is asked for again later", async () => {
  connect({ lineage: async () => null });
  globalThis.fetch = async () => Promise.reject(new TypeError("failed"));
  await assert.rejects(server.lineage("1"), { message: /did not answer/ });
  assert.equal(gates[0].closed, false);
});

test("a server that refuses this page says why at its top", async () => {
  connect({ lineage: async () => Promise.reject(new Error("Forbidden")) });
  globalThis.fetch = async () => Response.json({ detail: "pass Host on" }, { status: 403 });
  await assert.rejects(server.lineage("1"), { message: /at the top of the page/ });
  assert.deepEqual(gates, [{ closed: true, told: "pass Host on" }]);
});
