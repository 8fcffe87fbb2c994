-- A row is one identifier.

CREATE TABLE IF NOT EXISTS throttler_state (
  id      bytea PRIMARY KEY, -- the throttler's name, a colon and the identifier
  version bigint NOT NULL,   -- another with each change, never the same twice
  before  bigint NOT NULL,   -- the version that this one replaced
  state   bytea NOT NULL,    -- what has been spent of each bucket
  full_at bigint NOT NULL,   -- when all buckets are full, in microseconds since the epoch
  clocked boolean NOT NULL,  -- by a clock that the client sent, not by the server's
  CHECK (version BETWEEN 1 AND 4611686018427387904)
) WITH (fillfactor = 50);
