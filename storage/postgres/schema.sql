-- A row is one identifier. The names in this file begin with throttler_, which stands for the name that
-- Options give.

CREATE TABLE IF NOT EXISTS throttler_state (
  id      bytea PRIMARY KEY,  -- the throttler's name, a colon and the identifier
  version bigint NOT NULL,    -- one more with each change
  state   bytea NOT NULL,     -- what has been spent of each bucket
  full_at bigint NOT NULL,    -- when all buckets are full, in microseconds since the epoch
  clocked boolean NOT NULL    -- by a clock that the client sent, not by the server's
) WITH (fillfactor = 50);
