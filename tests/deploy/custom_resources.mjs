// Validates custom resources, an array of JSON on standard input, by the models that @kubernetes-models generates from
// the Go types of KEDA, Gateway API and the Prometheus operator, in the folder given. Prints an array of problems.
//
// The compiled validators pass over keys that they do not know, as an API server without field validation does. A key
// that a validator did not read is unknown to it, so every object is handed over in a proxy that records what is read.
import { readFileSync } from "node:fs";

const packages = {
  "gateway.networking.k8s.io": "gateway-api",
  "keda.sh": "keda",
  "monitoring.coreos.com": "prometheus-operator",
};

function recording(value, path, unread) {
  if (value === null || typeof value !== "object") return value;
  const keys = Object.keys(value);
  if (!Array.isArray(value)) keys.forEach((key) => unread.add(`${path}/${key}`));
  const copies = new Map();
  return new Proxy(value, {
    get(target, key) {
      if (typeof key === "symbol" || !Object.hasOwn(target, key)) return target[key];
      unread.delete(`${path}/${key}`);
      if (!copies.has(key)) copies.set(key, recording(target[key], `${path}/${key}`, unread));
      return copies.get(key);
    },
  });
}

const problems = [];
for (const resource of JSON.parse(readFileSync(0, "utf8"))) {
  const [group, version] = resource.apiVersion.split("/");
  const name = `${resource.kind}/${resource.metadata.name}`;
  const module = await import(`${process.argv[2]}/${packages[group]}/${group}/${version}/${resource.kind}.js`);
  const unread = new Set();
  const model = Object.create(module[resource.kind].prototype);
  for (const [key, value] of Object.entries(recording({ spec: resource.spec }, "", unread))) model[key] = value;
  model.apiVersion = resource.apiVersion;
  model.kind = resource.kind;
  model.metadata = resource.metadata;
  try {
    model.validate();
  } catch (error) {
    problems.push(`${name}: ${error.message}`);
  }
  for (const path of unread) problems.push(`${name}: ${path} is unknown`);
}
console.log(JSON.stringify(problems));
