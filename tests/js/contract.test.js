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

test("the form has a value for each field of Python's, and no other", known, () => {
  const values = formValues(job(), true);
  assert.deepEqual(Object.keys(values).sort(), [...python.fields].sort());
  assert.ok(Object.values(values).every((value) => value !== undefined));
});

test("without LoRAs on offer none is chosen", () => {
  assert.equal(formValues(job({ lora: "noir" }), true).lora, "noir");
  assert.equal(formValues(job({ lora: "noir" }), false).lora, "");
  assert.equal(formValues(job(), true).lora, "");
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
