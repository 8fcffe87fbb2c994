-- What the storage keeps and how it decides. Every name begins with throttler_, which stands for the
-- names that Options give. The functions are those of version 1: a later version has others beside them,
-- so that two versions of a program can run at the same time. They carry the numbers of the steps of
-- storage/decide.go.
--
-- A row is one identifier: the names of its buckets, for each of them the law under which it was spent
-- (kind, period, refill, tick, grain), and in state for each of them when it was last changed, the number of
-- its holds, and the end and N of each.

CREATE TABLE IF NOT EXISTS throttler_state (
  id      bytea PRIMARY KEY, -- the throttler's name, a colon and the identifier
  names   text[] NOT NULL,
  laws    bigint[] NOT NULL,
  state   bigint[] NOT NULL,
  full_at bigint NOT NULL,   -- when all buckets are full, in microseconds since the epoch
  clocked boolean NOT NULL   -- by a clock that the client sent, not by the server's
) WITH (fillfactor = 50);

-- In the functions s is one bucket: kind, period, refill, tick, grain, when it was last changed, then end
-- and N of each hold. A law is the first five of these.

CREATE OR REPLACE FUNCTION throttler_one_1(s bigint[]) RETURNS bigint LANGUAGE sql IMMUTABLE AS
  'SELECT CASE WHEN s[1] IN (1, 3) THEN s[2] / s[4] ELSE 1 END';

CREATE OR REPLACE FUNCTION throttler_ceil_1(a bigint, b bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS
  'SELECT (a + b - 1) / b';

-- Step 1.
CREATE OR REPLACE FUNCTION throttler_believable_1(s bigint[], wall bigint) RETURNS boolean LANGUAGE sql IMMUTABLE AS
  'SELECT s IS NOT NULL AND s[6] <= wall + s[2] + 60000000';

-- What has not come back at now, in units.
CREATE OR REPLACE FUNCTION throttler_units_1(s bigint[], now bigint) RETURNS bigint LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  u bigint := 0;
  dt bigint;
BEGIN
  IF s[1] = 1 THEN
    dt := now / s[4] - s[6] / s[4];
    IF cardinality(s) > 6 AND dt < throttler_ceil_1(s[8], s[3]) THEN
      u := s[8] - s[3] * dt;
    END IF;
  ELSIF s[1] = 3 THEN
    FOR i IN 7..cardinality(s) BY 2 LOOP
      u := u + s[i + 1] * least(s[2] / s[4], greatest(0, (s[i] + s[2]) / s[4] - now / s[4]));
    END LOOP;
  ELSE
    FOR i IN 7..cardinality(s) BY 2 LOOP
      IF s[i] > now THEN
        u := u + s[i + 1];
      END IF;
    END LOOP;
  END IF;
  RETURN u;
END $$;

-- Units in tokens, rounded up.
CREATE OR REPLACE FUNCTION throttler_spent_1(s bigint[], now bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS
  'SELECT throttler_ceil_1(throttler_units_1(s, now), throttler_one_1(s))';

-- The moment when spent, now as given, will have fallen to room.
CREATE OR REPLACE FUNCTION throttler_back_1(s bigint[], now bigint, room bigint, spent bigint) RETURNS bigint LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  remaining bigint := 0;
BEGIN
  IF spent <= room THEN
    RETURN now;
  ELSIF s[1] = 1 THEN
    RETURN (s[6] / s[4] + throttler_ceil_1(s[8] - room * throttler_one_1(s), s[3])) * s[4];
  END IF;
  FOR i IN 8..cardinality(s) BY 2 LOOP
    remaining := remaining + s[i];
  END LOOP;
  FOR i IN 7..cardinality(s) BY 2 LOOP
    remaining := remaining - s[i + 1];
    IF remaining <= room THEN
      IF s[1] = 3 THEN
        RETURN s[i] + s[2] - (room - remaining) * throttler_one_1(s) / s[i + 1] * s[4];
      END IF;
      RETURN s[i];
    END IF;
  END LOOP;
  RETURN now;
END $$;

-- When the hold of a token taken now ends.
CREATE OR REPLACE FUNCTION throttler_finish_1(law bigint[], now bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS
  'SELECT CASE WHEN law[1] IN (2, 3) THEN now - now % law[2] + law[2]
               WHEN law[1] = 4 THEN throttler_ceil_1(now + law[2], law[5]) * law[5]
               ELSE now + law[2] END';

-- A bucket without its dead holds.
CREATE OR REPLACE FUNCTION throttler_living_1(s bigint[], now bigint) RETURNS bigint[] LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  fade bigint := CASE WHEN s[1] = 3 THEN s[2] ELSE 0 END;
  i int := 7;
BEGIN
  WHILE i < cardinality(s) AND (s[i] + fade) / s[4] <= now / s[4] LOOP
    i := i + 2;
  END LOOP;
  RETURN CASE WHEN i = 7 THEN s ELSE s[1:6] || s[i:] END;
END $$;

-- The bucket under a law with capacity c, ready for a change at its own time, which is in s[6].
CREATE OR REPLACE FUNCTION throttler_open_1(s bigint[], law bigint[], c bigint, wall bigint) RETURNS bigint[] LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  now bigint;
  u bigint;
  n bigint;
  finish bigint;
BEGIN
  IF NOT throttler_believable_1(s, wall) THEN
    RETURN law || wall;
  END IF;
  now := greatest(wall, s[6]);
  IF law[1] <> 1 AND s[1:5] = law THEN
    s := throttler_living_1(s, now);
    s[6] := now;
    RETURN s;
  END IF;
  u := throttler_units_1(s, now);
  IF u = 0 THEN
    RETURN law || now;
  END IF;
  n := least(throttler_ceil_1(u, throttler_one_1(s)), 4 * c);
  IF law[1] = 1 THEN
    RETURN law || now || 0::bigint || CASE
      WHEN s[1:5] = law THEN u
      WHEN throttler_one_1(s) = throttler_one_1(law) THEN least(u, n * throttler_one_1(s))
      ELSE n * throttler_one_1(law) END;
  END IF;
  finish := throttler_back_1(s, now, 0, 1);
  IF law[1] = 3 THEN
    finish := greatest(0, finish - law[2]) / law[2] * law[2];
  END IF;
  RETURN law || now || greatest(finish, throttler_finish_1(law, now)) || n;
END $$;

CREATE OR REPLACE FUNCTION throttler_full_1(s bigint[], wall bigint) RETURNS boolean LANGUAGE sql IMMUTABLE AS
  'SELECT NOT throttler_believable_1(s, wall) OR s[6] <= wall AND throttler_units_1(s, wall) = 0';

-- A bucket of a row, by its place or by its name. Null if there is none of that name.
CREATE OR REPLACE FUNCTION throttler_bucket_1(names text[], laws bigint[], state bigint[], name text) RETURNS bigint[] LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  o int := 0;
BEGIN
  FOR b IN 1..cardinality(names) LOOP
    IF names[b] = name THEN
      RETURN laws[5 * b - 4:5 * b] || state[o + 1] || state[o + 3:o + 2 + 2 * state[o + 2]];
    END IF;
    o := o + 2 + 2 * state[o + 2];
  END LOOP;
  RETURN NULL;
END $$;

-- A row to which a bucket is added, unless it is full.
CREATE OR REPLACE FUNCTION throttler_keep_1(INOUT r throttler_state, name text, s bigint[], wall bigint) LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  now bigint;
BEGIN
  IF s IS NULL OR throttler_full_1(s, wall) THEN
    RETURN;
  END IF;
  now := greatest(wall, s[6]);
  r.names := r.names || name;
  r.laws := r.laws || s[1:5];
  r.state := r.state || s[6] || ((cardinality(s) - 6) / 2)::bigint || s[7:];
  r.full_at := greatest(r.full_at, throttler_back_1(s, now, 0, throttler_spent_1(s, now)));
END $$;

-- Whether a row is in the form above.
CREATE OR REPLACE FUNCTION throttler_sound_1(r throttler_state) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  o int := 0;
  k bigint[];
BEGIN
  IF array_position(r.names, NULL) IS NOT NULL OR array_position(r.laws, NULL) IS NOT NULL OR array_position(r.state, NULL) IS NOT NULL
    OR cardinality(r.laws) <> 5 * cardinality(r.names) THEN
    RETURN false;
  END IF;
  FOR b IN 1..cardinality(r.names) LOOP
    k := r.laws[5 * b - 4:5 * b];
    IF NOT coalesce(k[1] BETWEEN 0 AND 4 AND k[2] > 0 AND (k[1] <> 1 OR k[3] > 0) AND k[4] > 0 AND k[2] % k[4] = 0 AND k[5] > 0
      AND r.state[o + 2] BETWEEN 0 AND 100000, false) THEN
      RETURN false;
    END IF;
    o := o + 2 + 2 * r.state[o + 2];
  END LOOP;
  RETURN o = cardinality(r.state);
END $$;

-- Steps 1 to 4 for the buckets of one identifier: what is spent of each, and a code: 1 if they admit the costs,
-- 0 if not, 2 if the row is none of ours, and 256 and the number of buckets if these are too many.
CREATE OR REPLACE FUNCTION throttler_judge_1(r throttler_state, rules text[], laws bigint[], capacities bigint[], costs bigint[], mode int, wall bigint,
  OUT code int, OUT spent bigint[]) LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  s bigint[];
  n int := cardinality(rules);
BEGIN
  IF NOT throttler_sound_1(r) THEN
    code := 2;
    RETURN;
  END IF;
  FOR b IN 1..coalesce(cardinality(r.names), 0) LOOP
    IF r.names[b] <> ALL (rules) AND NOT throttler_full_1(throttler_bucket_1(r.names, r.laws, r.state, r.names[b]), wall) THEN
      n := n + 1;
    END IF;
  END LOOP;
  IF n > 16 THEN
    code := 256 + n;
    RETURN;
  END IF;
  code := 1;
  FOR i IN 1..cardinality(rules) LOOP
    s := throttler_bucket_1(r.names, r.laws, r.state, rules[i]);
    spent[i] := 0;
    IF throttler_believable_1(s, wall) THEN -- 1
      spent[i] := throttler_spent_1(s, greatest(wall, s[6])); -- 2, 3
    END IF;
    IF costs[i] > capacities[i] - spent[i] AND costs[i] > 0 AND mode <> 2 THEN -- 4
      code := 0;
    END IF;
  END LOOP;
END $$;

-- The answer for the buckets of one identifier: what remains of each, when it is full again, and when it admits
-- the cost. If the request was admitted this is step 5, and r becomes what is to be written.
CREATE OR REPLACE FUNCTION throttler_settle_1(INOUT r throttler_state, rules text[], laws bigint[], capacities bigint[], costs bigint[], spent bigint[],
  admitted boolean, wall bigint, OUT answer bigint[], OUT changed boolean) LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  old throttler_state := r;
  s bigint[];
  law bigint[];
  c bigint;
  n bigint;
  cost bigint;
  now bigint;
  k int;
  retry bigint;
BEGIN
  changed := false;
  r.names := '{}';
  r.laws := '{}';
  r.state := '{}';
  r.full_at := wall;
  FOR i IN 1..cardinality(rules) LOOP
    s := throttler_bucket_1(old.names, old.laws, old.state, rules[i]);
    law := laws[5 * i - 4:5 * i];
    c := capacities[i];
    n := spent[i];
    retry := 0;
    IF admitted AND costs[i] > 0 THEN -- 5
      s := throttler_open_1(s, law, c, wall);
      now := s[6];
      k := cardinality(s);
      cost := least(costs[i], greatest(0, 4 * c - n));
      IF law[1] = 1 THEN
        s[7] := 0;
        s[8] := coalesce(s[8], 0) + cost * throttler_one_1(law);
      ELSIF cost > 0 THEN
        IF k > 6 AND (law[1] = 0 OR s[k - 1] >= throttler_finish_1(law, now)) THEN
          s[k] := s[k] + cost;
        ELSE
          s := s || throttler_finish_1(law, now) || cost;
        END IF;
      END IF;
      n := n + cost;
      changed := true;
      answer := answer || greatest(0, c - n) || throttler_back_1(s, now, 0, n) - wall || 0::bigint;
      r := throttler_keep_1(r, rules[i], s, wall);
    ELSE
      r := throttler_keep_1(r, rules[i], s, wall);
      IF NOT throttler_believable_1(s, wall) THEN
        s := law || wall;
      END IF;
      now := greatest(wall, s[6]);
      IF costs[i] > 0 AND costs[i] > c - n THEN
        retry := throttler_back_1(s, now, c - costs[i], n) - wall;
      END IF;
      answer := answer || greatest(0, c - n) || throttler_back_1(s, now, 0, n) - wall || retry;
    END IF;
  END LOOP;
  FOR b IN 1..coalesce(cardinality(old.names), 0) LOOP
    IF old.names[b] <> ALL (rules) THEN
      r := throttler_keep_1(r, old.names[b], throttler_bucket_1(old.names, old.laws, old.state, old.names[b]), wall);
    END IF;
  END LOOP;
END $$;

CREATE OR REPLACE FUNCTION throttler_clock_1() RETURNS bigint LANGUAGE sql VOLATILE AS
  'SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint';

-- The row of an identifier, which is empty if there is none; its version is null then.
CREATE OR REPLACE FUNCTION throttler_load_1(key bytea, locked boolean, OUT r throttler_state, OUT version xid) LANGUAGE plpgsql VOLATILE AS $$
BEGIN
  IF locked THEN
    SELECT t.names, t.laws, t.state, t.xmin INTO r.names, r.laws, r.state, version FROM throttler_state t WHERE t.id = key FOR UPDATE;
  ELSE
    SELECT t.names, t.laws, t.state, t.xmin INTO r.names, r.laws, r.state, version FROM throttler_state t WHERE t.id = key;
  END IF;
  r.id := key;
  IF version IS NULL THEN
    r.names := '{}';
    r.laws := '{}';
    r.state := '{}';
  END IF;
END $$;

-- Writes a row if the one in its place still has the version that was loaded, and says whether it has.
CREATE OR REPLACE FUNCTION throttler_store_1(r throttler_state, version xid) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
  IF version IS NULL THEN
    INSERT INTO throttler_state VALUES (r.*) ON CONFLICT DO NOTHING;
  ELSE
    UPDATE throttler_state t SET names = r.names, laws = r.laws, state = r.state, full_at = r.full_at, clocked = r.clocked
    WHERE t.id = r.id AND t.xmin = version;
  END IF;
  RETURN FOUND;
END $$;

-- The short way, for a request whose buckets are those of the row, under the same laws and with one hold each, before
-- and after: nearly all of them. Its n buckets begin after place a of the lists, and each has four numbers of the
-- state. The code is null if the request is not for the short way.
CREATE OR REPLACE FUNCTION throttler_short_1(INOUT state bigint[], mode int, wall bigint, a int, n int, laws bigint[], capacities bigint[], costs bigint[],
  OUT code bigint, OUT answer bigint[], OUT full_at bigint) LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  o int := 0;
  i int := a;
  l int := 5 * a;
  k bigint;
  p bigint;
  q bigint;
  c bigint;
  m bigint;
  w bigint;
  now bigint;
  back bigint;
  room bigint;
  admitted boolean := true;
  units bigint[];
  spent bigint[];
BEGIN
  FOR b IN 1..n LOOP
    k := laws[l + 1];
    p := laws[l + 2];
    now := state[o + 1];
    IF state[o + 2] <> 1 OR now > wall + p + 60000000 THEN -- 1
      RETURN;
    END IF;
    now := greatest(wall, now); -- 2
    IF k = 1 OR k = 3 THEN -- 3
      q := laws[l + 4];
      w := p / q;
      IF k = 1 THEN
        m := now / q - state[o + 1] / q;
        m := CASE WHEN m < (state[o + 4] + laws[l + 3] - 1) / laws[l + 3] THEN state[o + 4] - laws[l + 3] * m ELSE 0 END;
      ELSE
        m := state[o + 4] * least(w, greatest(0, (state[o + 3] + p) / q - now / q));
      END IF;
      units[b] := m;
      m := (m + w - 1) / w;
    ELSE
      m := CASE WHEN state[o + 3] > now THEN state[o + 4] ELSE 0 END;
    END IF;
    spent[b] := m;
    IF costs[i + 1] > capacities[i + 1] - m AND costs[i + 1] > 0 AND mode <> 2 THEN -- 4
      admitted := false;
    END IF;
    o := o + 4;
    i := i + 1;
    l := l + 5;
  END LOOP;

  full_at := wall;
  o := 0;
  i := a;
  l := 5 * a;
  FOR b IN 1..n LOOP
    k := laws[l + 1];
    p := laws[l + 2];
    q := laws[l + 4];
    c := capacities[i + 1];
    m := spent[b];
    room := costs[i + 1];
    now := greatest(wall, state[o + 1]);
    back := now;
    IF admitted THEN -- 5
      IF room = 0 THEN
        RETURN;
      END IF;
      room := least(room, greatest(0, 4 * c - m));
      IF k = 1 THEN
        w := units[b] + room * (p / q);
        state[o + 4] := w;
        back := (now / q + (w + laws[l + 3] - 1) / laws[l + 3]) * q;
      ELSE
        back := CASE k WHEN 0 THEN now + p WHEN 4 THEN (now + p + laws[l + 5] - 1) / laws[l + 5] * laws[l + 5] ELSE now - now % p + p END;
        IF m = 0 THEN
          state[o + 3] := back;
          state[o + 4] := room;
        ELSIF k = 0 OR state[o + 3] >= back THEN
          back := state[o + 3];
          state[o + 4] := state[o + 4] + room;
        ELSE
          RETURN;
        END IF;
        IF k = 3 THEN
          back := back + p;
        END IF;
      END IF;
      state[o + 1] := now;
      answer[3 * b - 2] := greatest(0, c - m - room);
      answer[3 * b] := 0;
    ELSE
      answer[3 * b - 2] := greatest(0, c - m);
      answer[3 * b] := 0;
      IF m > 0 THEN
        room := CASE WHEN room > 0 THEN c - room ELSE m END;
        IF k = 1 THEN
          back := (state[o + 1] / q + (state[o + 4] + laws[l + 3] - 1) / laws[l + 3]) * q;
          IF m > room THEN
            answer[3 * b] := (state[o + 1] / q + (state[o + 4] - room * (p / q) + laws[l + 3] - 1) / laws[l + 3]) * q - wall;
          END IF;
        ELSE
          back := state[o + 3] + CASE k WHEN 3 THEN p ELSE 0 END;
          IF m > room THEN
            answer[3 * b] := back - CASE k WHEN 3 THEN room * (p / q) / state[o + 4] * q ELSE 0 END - wall;
          END IF;
        END IF;
      END IF;
    END IF;
    answer[3 * b - 1] := back - wall;
    full_at := greatest(full_at, back);
    o := o + 4;
    i := i + 1;
    l := l + 5;
  END LOOP;
  code := CASE WHEN admitted THEN 1 ELSE 0 END;
END $$;

-- What the requests first to last do to the row of their identifier, one after the other. Shapes are the different
-- requests: the buckets of shape h are starts[h] + 1 to starts[h + 1], and its time is the server's if it is negative.
-- The answer has for each request the code of throttler_judge_1, and three numbers for each bucket. Changed
-- is 1 if only the state has changed, 2 if the names or laws have as well.
CREATE OR REPLACE FUNCTION throttler_row_1(INOUT row_names text[], INOUT row_laws bigint[], INOUT state bigint[], first int, last int,
  shape int[], starts int[], modes int[], times bigint[], names text[], laws bigint[], capacities bigint[], costs bigint[],
  OUT full_at bigint, OUT clocked boolean, OUT answer bigint[], OUT changed int) LANGUAGE plpgsql VOLATILE AS $$
DECLARE
  own bigint;
  wall bigint;
  h int;
  a int;
  n int;
  was int := 0; -- the shape before
  fits boolean; -- the row is as the short way needs it, as far as can be seen here
  r throttler_state;
  short record;
  judged record;
  settled record;
BEGIN
  changed := 0;
  FOR j IN first..last LOOP
    h := shape[j];
    IF times[h] >= 0 THEN
      wall := times[h];
    ELSE
      own := coalesce(own, throttler_clock_1());
      wall := own;
    END IF;
    IF h <> was THEN
      was := h;
      a := starts[h];
      n := starts[h + 1] - a;
      fits := row_names = names[a + 1:a + n] AND row_laws = laws[5 * a + 1:5 * (a + n)] AND cardinality(state) = 4 * n;
    END IF;
    IF fits THEN
      short := throttler_short_1(state, modes[h], wall, a, n, laws, capacities, costs);
      IF short.code IS NOT NULL THEN
        answer := answer || short.code || short.answer;
        IF short.code = 1 AND modes[h] <> 1 THEN
          state := short.state;
          full_at := short.full_at;
          clocked := times[h] >= 0;
          changed := greatest(changed, 1);
        END IF;
        CONTINUE;
      END IF;
    END IF;
    was := 0;
    r.names := row_names;
    r.laws := row_laws;
    r.state := state;
    judged := throttler_judge_1(r, names[a + 1:a + n], laws[5 * a + 1:5 * (a + n)], capacities[a + 1:a + n], costs[a + 1:a + n], modes[h], wall);
    IF judged.code > 1 THEN
      answer := answer || judged.code::bigint || array_fill(0::bigint, ARRAY[3 * n]);
      CONTINUE;
    END IF;
    settled := throttler_settle_1(r, names[a + 1:a + n], laws[5 * a + 1:5 * (a + n)], capacities[a + 1:a + n], costs[a + 1:a + n], judged.spent, judged.code = 1, wall);
    answer := answer || judged.code::bigint || settled.answer;
    IF settled.changed AND modes[h] <> 1 THEN
      r := settled.r;
      row_names := r.names;
      row_laws := r.laws;
      state := r.state;
      full_at := r.full_at;
      clocked := times[h] >= 0;
      changed := 2;
    END IF;
  END LOOP;
END $$;

-- Requests of one identifier each, of which ids has each identifier once, in order, with the first and the last of its
-- requests. The answer is that of throttler_row_1 for all of them.
--
-- The rows are read without a lock, and each is written if nobody else has written it meanwhile; else its
-- requests are decided again under a lock. So a refusal locks nothing and writes nothing.
CREATE OR REPLACE FUNCTION throttler_decide_1(ids bytea[], firsts int[], lasts int[], shape int[], starts int[], modes int[], times bigint[],
  names text[], laws bigint[], capacities bigint[], costs bigint[]) RETURNS bigint[] LANGUAGE plpgsql VOLATILE AS $$
DECLARE
  answer bigint[];
  loaded record;
  done record;
BEGIN
  FOR i IN 1..cardinality(ids) LOOP
    SELECT t.names, t.laws, t.state, t.xmin INTO loaded FROM throttler_state t WHERE t.id = ids[i];
    LOOP
      IF loaded.xmin IS NULL THEN
        done := throttler_row_1('{}', '{}', '{}', firsts[i], lasts[i], shape, starts, modes, times, names, laws, capacities, costs);
        EXIT WHEN done.changed = 0;
        INSERT INTO throttler_state VALUES (ids[i], done.row_names, done.row_laws, done.state, done.full_at, done.clocked) ON CONFLICT DO NOTHING;
      ELSE
        done := throttler_row_1(loaded.names, loaded.laws, loaded.state, firsts[i], lasts[i], shape, starts, modes, times, names, laws, capacities, costs);
        EXIT WHEN done.changed = 0;
        IF done.changed = 1 THEN
          UPDATE throttler_state t SET state = done.state, full_at = done.full_at, clocked = done.clocked
          WHERE t.id = ids[i] AND t.xmin = loaded.xmin;
        ELSE
          UPDATE throttler_state t SET names = done.row_names, laws = done.row_laws, state = done.state, full_at = done.full_at, clocked = done.clocked
          WHERE t.id = ids[i] AND t.xmin = loaded.xmin;
        END IF;
      END IF;
      EXIT WHEN FOUND;
      SELECT t.names, t.laws, t.state, t.xmin INTO loaded FROM throttler_state t WHERE t.id = ids[i] FOR UPDATE;
    END LOOP;
    answer := answer || done.answer;
  END LOOP;
  RETURN answer;
END $$;

-- One request of several identifiers, the parts of which are the shapes. A code above 1 has 65536 times the place of its
-- part, from 0 on, added. It is decided without a lock, and if it
-- is admitted then once more with all rows locked in the order of their identifiers.
CREATE OR REPLACE FUNCTION throttler_decide_all_1(ids bytea[], starts int[], mode int, sent bigint,
  names text[], laws bigint[], capacities bigint[], costs bigint[]) RETURNS bigint[] LANGUAGE plpgsql VOLATILE AS $$
DECLARE
  a int;
  z int;
  answer bigint[];
  loaded record;
  judged record;
  settled record;
  rows throttler_state[];
  versions xid[];
  r throttler_state;
  spent bigint[];
  dirty boolean;
  code int;
  wall bigint;
BEGIN
  FOR locked IN 0..1 LOOP
    IF locked = 1 THEN
      INSERT INTO throttler_state SELECT id, '{}', '{}', '{}', 0, sent >= 0 FROM unnest(ids) AS id ORDER BY id ON CONFLICT DO NOTHING;
      PERFORM 1 FROM throttler_state t WHERE t.id = ANY (ids) ORDER BY t.id FOR UPDATE;
    END IF;
    code := 1;
    dirty := false;
    spent := '{}';
    FOR i IN 1..cardinality(ids) LOOP
      loaded := throttler_load_1(ids[i], false);
      rows[i] := loaded.r;
      versions[i] := loaded.version;
    END LOOP;
    wall := CASE WHEN sent < 0 THEN throttler_clock_1() ELSE sent END;
    FOR i IN 1..cardinality(ids) LOOP
      a := starts[i] + 1;
      z := starts[i + 1];
      judged := throttler_judge_1(rows[i], names[a:z], laws[5 * a - 4:5 * z], capacities[a:z], costs[a:z], mode, wall);
      IF judged.code > 1 THEN
        RETURN (judged.code + 65536 * (i - 1))::bigint || array_fill(0::bigint, ARRAY[3 * cardinality(names)]);
      END IF;
      code := least(code, judged.code);
      spent := spent || judged.spent;
    END LOOP;
    answer := ARRAY[code::bigint];
    FOR i IN 1..cardinality(ids) LOOP
      a := starts[i] + 1;
      z := starts[i + 1];
      settled := throttler_settle_1(rows[i], names[a:z], laws[5 * a - 4:5 * z], capacities[a:z], costs[a:z], spent[a:z], code = 1, wall);
      answer := answer || settled.answer;
      IF settled.changed THEN
        dirty := true;
        IF locked = 1 THEN
          r := settled.r;
          r.clocked := sent >= 0;
          PERFORM throttler_store_1(r, versions[i]);
        END IF;
      END IF;
    END LOOP;
    EXIT WHEN NOT dirty OR mode = 1;
  END LOOP;
  RETURN answer;
END $$;

-- How many units a Continuous level has that n tokens left and that is empty in a given time.
CREATE OR REPLACE FUNCTION throttler_drained_1(law bigint[], n bigint, within bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS
  'SELECT CASE WHEN throttler_ceil_1(within, law[4]) >= throttler_ceil_1(n * throttler_one_1(law), law[3])
               THEN n * throttler_one_1(law) ELSE throttler_ceil_1(within, law[4]) * law[3] END';

-- When the hold of an amount from another store ends.
CREATE OR REPLACE FUNCTION throttler_received_1(s bigint[], now bigint, within bigint) RETURNS bigint LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  finish bigint := now + within - CASE WHEN s[1] = 3 THEN s[2] ELSE 0 END;
  k int := cardinality(s);
BEGIN
  RETURN CASE
    WHEN s[1] IN (2, 3) THEN greatest(0, finish + s[2] / 2) / s[2] * s[2]
    WHEN s[1] = 4 THEN throttler_ceil_1(finish, s[5]) * s[5]
    WHEN k > 6 AND abs(s[k - 1] - finish) < throttler_ceil_1(s[2], 2) THEN s[k - 1]
    ELSE finish END;
END $$;

CREATE OR REPLACE FUNCTION throttler_level_1(s bigint[], units bigint) RETURNS bigint[] LANGUAGE sql IMMUTABLE AS
  'SELECT s[1:6] || 0::bigint || coalesce(s[8], 0) + units';

CREATE OR REPLACE FUNCTION throttler_charge_1(s bigint[], law bigint[], c bigint, n bigint, within bigint, wall bigint) RETURNS bigint[] LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  now bigint;
  finish bigint;
  i int := 7;
BEGIN
  s := throttler_open_1(s, law, c, wall);
  now := s[6];
  n := least(n, 4 * c - throttler_spent_1(s, now));
  IF n <= 0 OR within <= 0 THEN
    RETURN s;
  ELSIF law[1] = 1 THEN
    RETURN throttler_level_1(s, throttler_drained_1(law, n, within));
  END IF;
  finish := throttler_received_1(s, now, within);
  IF finish + (CASE WHEN law[1] = 3 THEN law[2] ELSE 0 END) <= now THEN
    RETURN s;
  END IF;
  WHILE i < cardinality(s) AND s[i] < finish LOOP
    i := i + 2;
  END LOOP;
  IF i < cardinality(s) AND s[i] = finish THEN
    s[i + 1] := s[i + 1] + n;
    RETURN s;
  END IF;
  RETURN s[:i - 1] || finish || n || s[i:];
END $$;

CREATE OR REPLACE FUNCTION throttler_refund_1(s bigint[], law bigint[], n bigint, within bigint, wall bigint) RETURNS bigint[] LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  now bigint;
  want bigint;
  far bigint;
  made int;
BEGIN
  IF s IS NULL OR within <= 0 THEN
    RETURN s;
  END IF;
  now := greatest(wall, s[6]);
  IF s[1] = 1 THEN
    n := least(n, 9007199254740992 / throttler_one_1(s));
    RETURN throttler_level_1(s, -least(throttler_units_1(s, now), throttler_drained_1(s, n, within)));
  END IF;
  s := throttler_living_1(s, now);
  want := wall + within - CASE WHEN s[1] = 3 THEN s[2] ELSE 0 END;
  far := throttler_ceil_1(s[2], 2);
  IF s[1:5] <> law THEN
    want := 1::bigint << 60;
    far := 1::bigint << 62;
  ELSIF s[1] = 4 THEN
    far := throttler_ceil_1(s[2], 256) + s[5];
  END IF;
  WHILE n > 0 AND cardinality(s) > 6 LOOP
    made := 7;
    FOR i IN 7..cardinality(s) BY 2 LOOP
      IF abs(s[i] - want) <= abs(s[made] - want) THEN
        made := i;
      END IF;
    END LOOP;
    IF abs(s[made] - want) > far THEN
      RETURN s;
    ELSIF n < s[made + 1] THEN
      s[made + 1] := s[made + 1] - n;
      RETURN s;
    END IF;
    n := n - s[made + 1];
    s := s[:made - 1] || s[made + 2:];
  END LOOP;
  RETURN s;
END $$;

-- The pointwise maximum of the curves of s and of a debt, of which n and within are the amounts: at each end, from
-- the last down, the larger of the two sums of what is held from there on.
CREATE OR REPLACE FUNCTION throttler_raise_1(s bigint[], law bigint[], c bigint, n bigint[], within bigint[], wall bigint) RETURNS bigint[] LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  now bigint;
  fade bigint := CASE WHEN law[1] = 3 THEN law[2] ELSE 0 END;
  finish bigint;
  finishes bigint[] := '{}';
  counts bigint[] := '{}';
  held bigint := 0;
  ours bigint;
  theirs bigint;
  holds bigint[] := '{}';
BEGIN
  s := throttler_open_1(s, law, c, wall);
  now := s[6];
  FOR i IN 1..cardinality(n) LOOP
    CONTINUE WHEN n[i] <= 0 OR within[i] <= 0;
    IF law[1] = 1 THEN
      s := throttler_level_1(s, greatest(0, throttler_drained_1(law, least(n[i], 4 * c), within[i]) - throttler_units_1(s, now)));
      CONTINUE;
    END IF;
    finish := throttler_received_1(s, now, within[i]);
    IF finish + fade > now THEN
      finishes := finishes || finish;
      counts := counts || least(n[i], 4 * c);
    END IF;
  END LOOP;
  IF cardinality(finishes) = 0 THEN
    RETURN s;
  END IF;
  FOR finish IN SELECT DISTINCT f FROM (SELECT unnest(finishes) AS f UNION ALL SELECT s[i] FROM generate_series(7, cardinality(s), 2) AS i) AS e ORDER BY f DESC LOOP
    SELECT coalesce(sum(s[i + 1]), 0) INTO ours FROM generate_series(7, cardinality(s), 2) AS i WHERE s[i] >= finish;
    SELECT least(4 * c, coalesce(sum(counts[i]), 0)) INTO theirs FROM generate_series(1, cardinality(finishes)) AS i WHERE finishes[i] >= finish;
    IF greatest(ours, theirs) > held THEN
      holds := ARRAY[finish, greatest(ours, theirs) - held] || holds;
      held := greatest(ours, theirs);
    END IF;
  END LOOP;
  RETURN s[1:6] || holds;
END $$;

-- Changes of one identifier each, in the order of the identifiers: 0 charges the amounts of its buckets, and gives
-- back those that are negative, 1 raises to its debts, 2 forgets. The buckets of change i are starts[i] + 1 to
-- starts[i + 1], the amounts of bucket b are amounts[b] + 1 to amounts[b + 1]. The answer has the code of each
-- change: 1 if it is done, else that of throttler_judge_1.
CREATE OR REPLACE FUNCTION throttler_change_1(ids bytea[], what int[], times bigint[], starts int[],
  names text[], laws bigint[], capacities bigint[], amounts int[], n bigint[], within bigint[]) RETURNS bigint[] LANGUAGE plpgsql VOLATILE AS $$
DECLARE
  answer bigint[] := '{}';
  loaded record;
  judged record;
  r throttler_state;
  new throttler_state;
  s bigint[];
  law bigint[];
  wall bigint;
  f int;
  l int;
BEGIN
  FOR i IN 1..cardinality(ids) LOOP
    answer[i] := 1;
    IF what[i] = 2 THEN
      DELETE FROM throttler_state t WHERE t.id = ids[i];
      CONTINUE;
    END IF;
    LOOP
      loaded := throttler_load_1(ids[i], true);
      r := loaded.r;
      wall := CASE WHEN times[i] < 0 THEN throttler_clock_1() ELSE times[i] END;
      judged := throttler_judge_1(r, names[starts[i] + 1:starts[i + 1]], '{}', capacities[starts[i] + 1:starts[i + 1]],
        array_fill(0::bigint, ARRAY[starts[i + 1] - starts[i]]), 1, wall);
      IF judged.code > 1 THEN
        answer[i] := judged.code;
        EXIT;
      END IF;
      new := r;
      new.names := '{}';
      new.laws := '{}';
      new.state := '{}';
      new.full_at := wall;
      new.clocked := times[i] >= 0;
      FOR b IN starts[i] + 1..starts[i + 1] LOOP
        s := throttler_bucket_1(r.names, r.laws, r.state, names[b]);
        law := laws[5 * b - 4:5 * b];
        f := amounts[b] + 1;
        l := amounts[b + 1];
        IF what[i] = 1 AND f <= l THEN
          s := throttler_raise_1(s, law, capacities[b], n[f:l], within[f:l], wall);
        ELSIF what[i] = 0 AND n[f] > 0 THEN
          s := throttler_charge_1(s, law, capacities[b], n[f], within[f], wall);
        ELSIF what[i] = 0 AND n[f] < 0 THEN
          s := throttler_refund_1(s, law, -n[f], within[f], wall);
        END IF;
        new := throttler_keep_1(new, names[b], s, wall);
      END LOOP;
      FOR b IN 1..cardinality(r.names) LOOP
        IF r.names[b] <> ALL (names[starts[i] + 1:starts[i + 1]]) THEN
          new := throttler_keep_1(new, r.names[b], throttler_bucket_1(r.names, r.laws, r.state, r.names[b]), wall);
        END IF;
      END LOOP;
      EXIT WHEN cardinality(new.names) = 0 AND loaded.version IS NULL OR throttler_store_1(new, loaded.version);
    END LOOP;
  END LOOP;
  RETURN answer;
END $$;

-- Removes those of the next rows after an identifier whose buckets are all full, and says how many, and which
-- row was the last that it looked at: null if there are no more. It waits for nobody. Rows that clients' clocks
-- have written are full by the time sent, and only those between since and until are looked at; none if that is
-- negative.
CREATE OR REPLACE FUNCTION throttler_sweep_1(after bytea, rows int, since bytea, until bytea, sent bigint,
  OUT removed bigint, OUT last bytea) LANGUAGE sql VOLATILE AS $$
  WITH clock AS MATERIALIZED (SELECT throttler_clock_1() AS now),
  near AS MATERIALIZED (SELECT t.id, t.full_at, t.clocked FROM throttler_state t WHERE t.id > after ORDER BY t.id LIMIT rows),
  found AS MATERIALIZED (
    SELECT near.id FROM near, clock
    WHERE CASE WHEN near.clocked THEN near.full_at <= sent AND near.id >= since AND near.id < until ELSE near.full_at <= clock.now END),
  gone AS MATERIALIZED (
    SELECT t.id FROM throttler_state t JOIN found ON found.id = t.id, clock
    WHERE t.full_at <= CASE WHEN t.clocked THEN sent ELSE clock.now END
    FOR UPDATE OF t SKIP LOCKED),
  deleted AS (DELETE FROM throttler_state t USING gone WHERE t.id = gone.id RETURNING t.id)
  SELECT (SELECT count(*) FROM deleted), CASE WHEN (SELECT count(*) FROM near) = rows THEN (SELECT max_id.id FROM (SELECT near.id FROM near ORDER BY near.id DESC LIMIT 1) AS max_id) END
$$;
