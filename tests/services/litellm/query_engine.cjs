#!/usr/bin/env node
// Prisma's query engine as prisma-client-py 0.15 expects it: a program that serves GraphQL over HTTP.
//
// The engine itself is Prisma's own, of the same version, in the WebAssembly build that @prisma/client carries; it speaks
// JSON and reaches PostgreSQL by @prisma/adapter-pg. The native program cannot be had from a package registry. Here
// stands what lies between the two: GraphQL is turned into JSON on the way in, typed values into plain ones on the way out.
'use strict';

const ENGINE = '393aa359c9ad4a4bb28630fb5613f9c281cde053'; // the build of 5.17.0, which the client checks
if (process.argv.includes('--version')) {
  console.log(`query-engine ${ENGINE}`);
  process.exit(0);
}

const fs = require('node:fs');
const http = require('node:http');
const path = require('node:path');

const MODULES = process.env.QUERY_ENGINE_NODE_MODULES;
const fromModules = (name) => require(path.join(MODULES, name));
const runtime = fromModules('@prisma/client/runtime/query_engine_bg.postgresql.js');
const { parse, valueFromASTUntyped } = fromModules('graphql');
const { PrismaPg } = fromModules('@prisma/adapter-pg');
const { bindAdapter } = fromModules('@prisma/driver-adapter-utils');
const pg = fromModules('pg');

const SCHEMA = fs.readFileSync(process.env.PRISMA_DML_PATH, 'utf8');
const PORT = Number(process.argv[process.argv.indexOf('-p') + 1]);

// Connections ---------------------------------------------------------------------------------------------------------

// The adapter knows no `name` and `name[]` of PostgreSQL's own catalogue: they are read as text.
const READ_AS = { 19: 25, 1003: 1009 };
const Result = fromModules('pg/lib/result.js');
const { addFields } = Result.prototype;
Result.prototype.addFields = function (fields) {
  for (const field of fields) field.dataTypeID = READ_AS[field.dataTypeID] ?? field.dataTypeID;
  return addFields.call(this, fields);
};

function databasePool() {
  const overwritten = JSON.parse(process.env.OVERWRITE_DATASOURCES || '[]')[0];
  const url = new URL(overwritten?.url ?? process.env.DATABASE_URL);
  const max = Number(url.searchParams.get('connection_limit') ?? 10);
  url.search = ''; // what Prisma's own notation adds, the driver does not know
  const pool = new pg.Pool({ connectionString: url.toString(), max });
  pool.on('error', (error) => console.error('connection lost:', error.message));
  return pool;
}

async function startEngine() {
  const wasm = path.join(MODULES, '@prisma/client/runtime/query_engine_bg.postgresql.wasm');
  const module = new WebAssembly.Module(fs.readFileSync(wasm));
  runtime.__wbg_set_wasm(new WebAssembly.Instance(module, { './query_engine_bg.js': runtime }).exports);
  const options = {
    datamodel: SCHEMA,
    env: process.env,
    logQueries: false,
    ignoreEnvVarErrors: true,
    datasourceOverrides: {},
    logLevel: 'error',
    configDir: '.',
    engineProtocol: 'json',
  };
  const engine = new runtime.QueryEngine(options, () => {}, bindAdapter(new PrismaPg(databasePool())));
  await engine.connect('{}');
  return engine;
}

// GraphQL -> JSON -----------------------------------------------------------------------------------------------------

// Model -> field -> type: a bare string in a Json field is JSON's, and has to be marked as such.
const TYPES = Object.fromEntries(
  [...SCHEMA.matchAll(/^model\s+(\w+)\s*\{([\s\S]*?)^\}/gm)].map(([, model, body]) => [
    model,
    Object.fromEntries(
      body
        .split('\n')
        .map((line) => line.trim().match(/^(\w+)\s+(\w+)/))
        .filter(Boolean)
        .map(([, field, type]) => [field, type]),
    ),
  ]),
);

const ACTIONS = [
  'findUniqueOrThrow', 'findFirstOrThrow', 'findUnique', 'findFirst', 'findMany', 'createOne', 'createMany',
  'updateOne', 'updateMany', 'deleteOne', 'deleteMany', 'upsertOne', 'aggregate', 'groupBy',
];
const RAW = ['queryRaw', 'executeRaw'];

const isObject = (value) => value !== null && typeof value === 'object';
const mapped = (value, change) => Object.fromEntries(Object.entries(value).map(([key, item]) => [key, change(key, item)]));

function markedJson(value) {
  if (typeof value === 'string') return { $type: 'Json', value };
  if (Array.isArray(value)) return value.map(markedJson);
  if (!isObject(value)) return value;
  return mapped(value, (key, item) => (key === 'path' || key === 'mode' ? item : markedJson(item)));
}

function marked(model, value) {
  if (Array.isArray(value)) return value.map((item) => marked(model, item));
  if (!isObject(value)) return value;
  return mapped(value, (key, item) => {
    const type = TYPES[model]?.[key];
    return type === 'Json' ? markedJson(item) : marked(TYPES[type] ? type : model, item);
  });
}

const argumentsOf = (field) =>
  Object.fromEntries((field.arguments ?? []).map((item) => [item.name.value, valueFromASTUntyped(item.value)]));

function selectionOf(set) {
  const fields = (set?.selections ?? []).map((field) => [
    field.name.value,
    field.selectionSet ? { arguments: argumentsOf(field), selection: selectionOf(field.selectionSet) } : true,
  ]);
  return Object.fromEntries(fields);
}

function splitName(name) {
  // findUniqueUserOrThrow: the model stands in the midst of the action.
  const thrown = name.match(/^(findUnique|findFirst)(.+)OrThrow$/);
  if (thrown) return [`${thrown[1]}OrThrow`, thrown[2]];
  const action = ACTIONS.find((known) => name.startsWith(known));
  return [action, name.slice(action.length)];
}

function toJson(graphql) {
  const field = parse(graphql, { noLocation: true }).definitions[0].selectionSet.selections[0];
  const given = argumentsOf(field);
  if (RAW.includes(field.name.value)) {
    return { action: field.name.value, query: { arguments: { parameters: '[]', ...given }, selection: {} } };
  }
  const [action, modelName] = splitName(field.name.value);
  return { modelName, action, query: { arguments: marked(modelName, given), selection: selectionOf(field.selectionSet) } };
}

// JSON -> GraphQL's answer --------------------------------------------------------------------------------------------

function plain(value) {
  if (Array.isArray(value)) return value.map(plain);
  if (!isObject(value)) return value;
  return '$type' in value && 'value' in value ? value.value : mapped(value, (_, item) => plain(item));
}

function withParsedJson(rows) {
  if (!Array.isArray(rows)) return rows;
  for (const cell of rows.flatMap((row) => Object.values(row))) {
    if (cell?.prisma__type !== 'json' || typeof cell.prisma__value !== 'string') continue;
    try {
      cell.prisma__value = JSON.parse(cell.prisma__value);
    } catch {
      // A string that is JSON already.
    }
  }
  return rows;
}

function answerOf(result, isRaw) {
  if (result.errors) return { errors: result.errors };
  const [value] = Object.values(result.data);
  return { data: { result: isRaw ? withParsedJson(value) : plain(value) } };
}

// HTTP ----------------------------------------------------------------------------------------------------------------

async function bodyOf(request) {
  const pieces = [];
  for await (const piece of request) pieces.push(piece);
  return Buffer.concat(pieces).toString();
}

async function runQuery(engine, asked, transaction) {
  const query = toJson(asked.query);
  const result = JSON.parse(await engine.query(JSON.stringify(query), '{}', transaction));
  if (result.errors) console.error(query.action, query.modelName ?? '', JSON.stringify(result.errors).slice(0, 600));
  return answerOf(result, query.modelName === undefined);
}

async function runBatch(engine, asked, transaction) {
  const batch = { batch: asked.batch.map((item) => toJson(item.query)), transaction: asked.transaction ? {} : undefined };
  const result = JSON.parse(await engine.query(JSON.stringify(batch), '{}', transaction));
  return result.errors ? result : { batchResult: result.batchResult.map((item) => answerOf(item, false)) };
}

async function answer(engine, request) {
  const [where] = request.url.split('?');
  if (where === '/status') return { status: 'ok' };
  if (where === '/metrics') return { counters: [], gauges: [], histograms: [] };
  const body = await bodyOf(request);
  if (where === '/transaction/start') return engine.startTransaction(body, '{}');
  const ended = where.match(/^\/transaction\/([^/]+)\/(commit|rollback)$/);
  if (ended) return (await engine[`${ended[2]}Transaction`](ended[1], '{}')) || '{}';
  const asked = JSON.parse(body);
  return (asked.batch ? runBatch : runQuery)(engine, asked, request.headers['x-transaction-id']);
}

async function main() {
  const engine = await startEngine();
  const server = http.createServer({ keepAliveTimeout: 60_000 }, async (request, response) => {
    let said;
    try {
      said = await answer(engine, request);
    } catch (error) {
      console.error(error);
      said = { errors: [{ error: String(error), user_facing_error: { message: String(error), is_panic: false } }] };
    }
    response.writeHead(200, { 'content-type': 'application/json' });
    response.end(typeof said === 'string' ? said : JSON.stringify(said));
  });
  server.listen(PORT, 'localhost');
}

for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(0));
main().catch((error) => {
  console.error(error);
  process.exit(1);
});
