// Checks a manifest of the Prometheus operator's on standard input against the schema of its CRD, which the package was
// generated from: prints what is wrong. Of a field that the schema does not know, its validator never asks for the value.
// The argument is the kind.
import {readFileSync} from "node:fs";

const kind = process.argv[2];
const {[kind]: Resource} = await import(`@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/${kind}`);
const {validate} = await import(
  `./node_modules/@kubernetes-models/prometheus-operator/_schemas/MonitoringCoreosComV1${kind}.js`
);

const asked = new Set();

function watched(value, path) {
  if (value === null || typeof value !== "object") return value;
  return new Proxy(value, {
    get(target, name) {
      const below = `${path}/${String(name)}`;
      asked.add(below);
      return watched(target[name], below);
    },
  });
}

function* paths(value, path) {
  if (value === null || typeof value !== "object") return;
  for (const [name, inner] of Object.entries(value)) {
    yield `${path}/${name}`;
    yield* paths(inner, `${path}/${name}`);
  }
}

const given = JSON.parse(readFileSync(0, "utf8"));
if (!Resource.is(given)) console.log(`no ${kind} of ${Resource.apiVersion}`);
if (!validate(watched(given, ""))) for (const {instancePath, message, keyword} of validate.errors) console.log(`${instancePath}: ${message ?? keyword}`);
for (const path of paths(given, "")) if (!asked.has(path)) console.log(`${path}: unknown`);
