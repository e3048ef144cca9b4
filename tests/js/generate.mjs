// What a JavaScript program does here: `node generate.mjs URL NAME PASSWORD`, or `URL --token TOKEN`.
// Prints one JSON object: what /generate streamed, and how the video's download was answered.
import { Client } from "@gradio/client";

const [url, name, password] = process.argv.slice(2);
const known = name === "--token" ? { token: password } : name ? { auth: [name, password] } : {};
const small = { height: 64, width: 64, num_frames: 7, num_inference_steps: 40 };

async function main() {
  const client = await Client.connect(url, { events: ["data", "status"], ...known });
  const asked = await client.predict("/submit_job", { prompt: "from node", ...small });
  const status = await client.predict("/get_job_status", { job_id: asked.data[0].id });
  const streamed = [];
  let video = null;
  for await (const event of client.submit("/generate", { prompt: "slow from node", ...small })) {
    if (event.type === "status" && event.stage === "error") throw new Error(event.message);
    if (event.type !== "data") continue;
    const [item] = event.data;
    if (item.url) video = item;
    else streamed.push([item.status, item.step]);
  }
  const headers = known.token ? { Authorization: `Bearer ${password}` } : {};
  const file = await client.fetch(video.url, { headers });
  const bytes = new Uint8Array(await file.arrayBuffer());
  const stranger = await fetch(video.url);
  client.close();
  return {
    job: asked.data[0],
    asked: status.data[0].id,
    streamed,
    file: [file.status, Buffer.from(bytes.slice(4, 8)).toString()],
    stranger: stranger.status,
  };
}

try {
  console.log(JSON.stringify(await main()));
  process.exit(0); // an open heartbeat would keep node
} catch (error) {
  console.log(JSON.stringify({ error: error.message }));
  process.exit(1);
}
