// Asks throttlerd once over HTTP and prints what it was answered. The argument is the base URL.
'use strict';

(async () => {
  const answer = await fetch(process.argv[2] + '/v1/decide', {
    method: 'POST',
    body: JSON.stringify({ domain: 'api', entries: { path: '/http' } }),
    signal: AbortSignal.timeout(30_000),
  });
  const { allowed } = await answer.json();
  console.log(JSON.stringify({ status: answer.status, retryAfter: answer.headers.get('retry-after'), allowed }));
})();
