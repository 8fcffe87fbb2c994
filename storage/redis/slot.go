package redis

import (
	"strconv"
	"strings"
	"sync"
)

// slot is the slot of a key in a cluster, as its specification has it
// (https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/): the CRC16 (XMODEM) of what
// stands between the first brace and the next closing one if that is anything, else of the key.
func slot(key string) uint16 {
	if _, after, ok := strings.Cut(key, "{"); ok {
		if tag, _, ok := strings.Cut(after, "}"); ok && tag != "" {
			key = tag
		}
	}
	crc := uint16(0)
	for i := range len(key) {
		crc ^= uint16(key[i]) << 8
		for range 8 {
			crc = crc<<1 ^ crc>>15*0x1021
		}
	}
	return crc % slots
}

const slots = 16384

// tagOf is a tag that puts a key into a slot, the same in all processes: the first number, in base 36, that does.
func tagOf(slot uint16) string { return strconv.FormatUint(uint64(tags()[slot]), 36) }

// tags are those of all slots, found in a few milliseconds when the first is needed.
var tags = sync.OnceValue(func() *[slots]uint32 {
	var found [slots]uint32 // 0 is none: the slot of "0" has another one
	for n, missing := uint32(1), slots; missing > 0; n++ {
		if at := &found[slot(strconv.FormatUint(uint64(n), 36))]; *at == 0 {
			*at = n
			missing--
		}
	}
	return &found
})
