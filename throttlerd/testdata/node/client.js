// Asks throttlerd once over HTTP and once over gRPC, with the client of npm and the protocol of Envoy, and prints what it
// was answered. NODE_PATH has the packages. Arguments: the base URL, the gRPC address, a file with the descriptors of the
// protocol.
'use strict';
const { readFileSync } = require('node:fs');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const [base, address, descriptors] = process.argv.slice(2);
const deadline = () => new Date(Date.now() + 30_000);

async function overHTTP() {
  const answer = await fetch(base + '/v1/decide', {
    method: 'POST',
    body: JSON.stringify({ domain: 'api', entries: { path: '/http' } }),
    signal: AbortSignal.timeout(30_000),
  });
  return { status: answer.status, retryAfter: answer.headers.get('retry-after'), allowed: (await answer.json()).allowed };
}

function overGRPC() {
  const definitions = loader.loadFileDescriptorSetFromBuffer(readFileSync(descriptors), { enums: String, keepCase: true });
  const { RateLimitService } = grpc.loadPackageDefinition(definitions).envoy.service.ratelimit.v3;
  const client = new RateLimitService(address, grpc.credentials.createInsecure());
  const request = { domain: 'api', descriptors: [{ entries: [{ key: 'path', value: '/grpc' }] }] };
  return new Promise((resolve, reject) => client.ShouldRateLimit(request, { deadline: deadline() }, (error, answer) => {
    client.close();
    if (error) return reject(error);
    const retry = answer.response_headers_to_add?.find(header => header.key === 'retry-after');
    resolve({ code: answer.overall_code, retryAfter: retry?.value ?? null });
  }));
}

(async () => console.log(JSON.stringify({ http: await overHTTP(), grpc: await overGRPC() })))();
