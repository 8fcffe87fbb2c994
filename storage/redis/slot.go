package redis

import "strings"

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
	return crc % 16384
}
