// Serves the Durable Streams protocol from Node: the folder in which npm installed it, and that for its data.
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [installed, dataDir] = process.argv.slice(2);
const found = createRequire(join(installed, "package.json")).resolve("@durable-streams/server");
const { DurableStreamTestServer } = await import(pathToFileURL(found).href);
const server = new DurableStreamTestServer({ port: 0, host: "127.0.0.1", dataDir });
console.log(`listens on ${await server.start()} `);
