// All schemes of NSQ-1 in Go, as a program that answers the frames of `nsq check`. Ids such as N1
// are rules of NSQ-1.
//
//	go build -o nsq_port nsq_port.go
//	nsq check ./nsq_port --all
//
// Go may fuse a product and a sum into one rounding, unless a conversion stands between them. Hence
// every float32(a*b) below that a sum follows.
package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"log"
	"math"
	"math/big"
	"os"
	"sort"
)

// --- frames ------------------------------------------------------------------------------------

const (
	typeFloat32 = iota
	typeFloat16
	typeBfloat16
	typeUint8
	typeInt32
)

var itemSize = []int{4, 2, 2, 1, 4}

type array struct {
	dtype int
	shape []int
	data  []byte
}

type frame map[string]array

func product(shape []int) int {
	n := 1
	for _, size := range shape {
		n *= size
	}
	return n
}

// readFrame returns the next frame, and its bytes as they came.
func readFrame(input io.Reader) (frame, []byte, error) {
	var raw bytes.Buffer
	reader := io.TeeReader(input, &raw)
	var head struct {
		Magic [4]byte
		Count uint32
	}
	if err := binary.Read(reader, binary.LittleEndian, &head); err != nil {
		return nil, nil, err
	}
	f := frame{}
	for range head.Count {
		var entry struct {
			Name        [32]byte
			Dtype, Axes uint32
			Shape       [4]uint32
		}
		if err := binary.Read(reader, binary.LittleEndian, &entry); err != nil {
			return nil, nil, err
		}
		a := array{dtype: int(entry.Dtype)}
		for _, size := range entry.Shape[:entry.Axes] {
			a.shape = append(a.shape, int(size))
		}
		a.data = make([]byte, product(a.shape)*itemSize[a.dtype])
		if _, err := io.ReadFull(reader, a.data); err != nil {
			return nil, nil, err
		}
		f[string(bytes.TrimRight(entry.Name[:], "\x00"))] = a
	}
	return f, raw.Bytes(), nil
}

func writeFrame(output io.Writer, f frame) {
	names := []string{}
	for name := range f {
		names = append(names, name)
	}
	sort.Strings(names)
	io.WriteString(output, "NSQ1")
	binary.Write(output, binary.LittleEndian, uint32(len(names)))
	for _, name := range names {
		a := f[name]
		var field [32]byte
		copy(field[:], name)
		shape := [4]uint32{1, 1, 1, 1}
		for i, size := range a.shape {
			shape[i] = uint32(size)
		}
		output.Write(field[:])
		binary.Write(output, binary.LittleEndian, []uint32{uint32(a.dtype), uint32(len(a.shape))})
		binary.Write(output, binary.LittleEndian, shape)
		output.Write(a.data)
	}
}

func intArray(values []int, shape ...int) array {
	var data []byte
	for _, v := range values {
		data = binary.LittleEndian.AppendUint32(data, uint32(int32(v)))
	}
	return array{typeInt32, shape, data}
}

func (a array) ints() []int {
	values := make([]int, len(a.data)/4)
	for i := range values {
		values[i] = int(int32(binary.LittleEndian.Uint32(a.data[4*i:])))
	}
	return values
}

// floatArray writes values that dtype holds exactly.
func floatArray(values []float32, dtype int, shape ...int) array {
	var data []byte
	for _, v := range values {
		bits := math.Float32bits(v)
		switch dtype {
		case typeFloat32:
			data = binary.LittleEndian.AppendUint32(data, bits)
		case typeBfloat16:
			data = binary.LittleEndian.AppendUint16(data, uint16(bits>>16))
		case typeFloat16:
			half := uint32(math.Abs(float64(v)) * 0x1p24) // subnormal
			if math.Abs(float64(v)) >= 0x1p-14 {
				half = bits&0x7fffffff>>13 - 112<<10
			}
			data = binary.LittleEndian.AppendUint16(data, uint16(bits>>31<<15|half))
		}
	}
	return array{dtype, shape, data}
}

// floats returns the elements, widened to float32 (I1).
func (a array) floats() []float32 {
	values := make([]float32, len(a.data)/itemSize[a.dtype])
	for i := range values {
		switch a.dtype {
		case typeFloat32:
			values[i] = math.Float32frombits(binary.LittleEndian.Uint32(a.data[4*i:]))
		case typeBfloat16:
			bits := binary.LittleEndian.Uint16(a.data[2*i:])
			values[i] = math.Float32frombits(uint32(bits) << 16)
		case typeFloat16:
			bits := binary.LittleEndian.Uint16(a.data[2*i:])
			values[i] = widenHalf(bits)
		}
	}
	return values
}

func widenHalf(bits uint16) float32 {
	exponent, mantissa := int(bits>>10&31), float64(bits&1023)
	v := math.Ldexp(1024+mantissa, exponent-25)
	if exponent == 0 {
		v = math.Ldexp(mantissa, -24)
	} else if exponent == 31 {
		v = math.Inf(1) // NaN too: both are refused
	}
	if bits>>15 == 1 {
		v = math.Copysign(v, -1)
	}
	return float32(v)
}

// --- rounding ----------------------------------------------------------------------------------

func isInf(v float32) bool    { return math.IsInf(float64(v), 0) }
func abs(v float32) float32   { return float32(math.Abs(float64(v))) }
func isFinite(v float32) bool { return !isInf(v) && v == v }

func largest(dtype int) float64 {
	return []float64{math.MaxFloat32, 65504, 0x1.fep127}[dtype]
}

// narrow rounds once to dtype: half to even, subnormals kept, infinity beyond the range.
func narrow(v float32, dtype int) float32 {
	if dtype == typeFloat32 {
		return v
	}
	bits, lowest := 10, -14
	if dtype == typeBfloat16 {
		bits, lowest = 7, -126
	}
	_, exponent := math.Frexp(float64(v))
	step := math.Ldexp(1, max(exponent-1, lowest)-bits)
	rounded := math.RoundToEven(float64(v)/step) * step
	if math.Abs(rounded) > largest(dtype) {
		return float32(math.Copysign(math.Inf(1), rounded))
	}
	return float32(rounded)
}

// stored narrows a value that is stored: never to -0 (Z1).
func stored(v float32, dtype int) float32 {
	return narrow(v, dtype) + 0
}

// exactDot holds any sum of products of two float32.
func exactDot(a, b []float32) *big.Float {
	sum := new(big.Float).SetPrec(1024)
	for j := range a {
		p := new(big.Float).SetFloat64(float64(a[j]) * float64(b[j])) // exact
		sum.Add(sum, p)
	}
	return sum
}

// norm is the square root of the exact sum of squares, correctly rounded (N1).
func norm(row []float32) float32 {
	sum := 0.0
	for _, v := range row {
		sum += float64(v) * float64(v)
	}
	root, slack := math.Sqrt(sum), float64(len(row)+8)*0x1p-53
	lower, upper := float32(root*(1-slack)), float32(root*(1+slack))
	if lower == upper {
		return lower
	}
	// Rare: compare the exact sum with the square of the middle of the two.
	middle := (float64(lower) + min(float64(upper), 0x1p128)) / 2
	switch exactDot(row, row).Cmp(new(big.Float).SetFloat64(middle * middle)) {
	case -1:
		return lower
	case 1:
		return upper
	}
	return float32(middle) // half to even
}

// leastSquares is <x, y> / <y, y>, correctly rounded (M3).
func leastSquares(x, y []float32) float32 {
	dot, size, square := 0.0, 0.0, 0.0
	for j := range x {
		p := float64(x[j]) * float64(y[j])
		dot += p
		size += math.Abs(p)
		square += float64(y[j]) * float64(y[j])
	}
	if square == 0 {
		return 0
	}
	quotient := dot / square
	slack := (size/square + math.Abs(quotient)) * float64(len(x)+8) * 0x1p-53
	lower, upper := float32(quotient-slack), float32(quotient+slack)
	if lower == upper {
		return lower
	}
	a, _ := exactDot(x, y).Rat(nil)
	b, _ := exactDot(y, y).Rat(nil)
	exact, _ := a.Quo(a, b).Float32()
	return exact
}

// --- schemes -----------------------------------------------------------------------------------

const (
	magnitudeNorm = iota
	magnitudeGain
	magnitudeLsq
)

type scheme struct {
	bits                            int
	separate, token, symmetric      bool
	search                          bool
	magnitude                       int
	blockSize, sinkTokens, outliers int
	scaleType, normType             int
}

func readScheme(a array) scheme {
	n := a.ints()
	return scheme{n[0], n[1] == 1, n[2] == 1, n[3] == 1, n[4] == 1, n[5], n[6], n[7], n[8], n[9], n[10]}
}

func (s scheme) offset() int {
	if s.symmetric {
		return 1 << (s.bits - 1)
	}
	return 0
}

func (s scheme) rowBytes(d int) int {
	if s.bits == 3 {
		return (d+3)/4 + (d+7)/8
	}
	return (d*s.bits + 7) / 8
}

// blockTokens is the number of tokens of a full block, of tokens after the sinks (B1).
func (s scheme) blockTokens(tokens int) int {
	if s.blockSize == 0 {
		return max(tokens, 1)
	}
	return s.blockSize
}

// --- one block ---------------------------------------------------------------------------------

// block holds the parts of one block; floats are those that are stored, widened.
type block struct {
	tokens, d   int
	codes       []int
	scale, zero []float32
	factor      []float32
	index       []int
	outliers    []float32
}

func (s scheme) encodeBlock(x []float32, d int) (*block, error) {
	tokens := len(x) / d
	b := &block{tokens: tokens, d: d, codes: make([]int, len(x))}
	direction, norms := make([]float32, len(x)), make([]float32, tokens)
	copy(direction, x)
	for t := range tokens {
		if s.separate {
			norms[t] = norm(x[t*d : t*d+d])
			if isInf(norms[t]) {
				return nil, errors.New("N1: a norm is beyond float32")
			}
			for j := t * d; j < t*d+d && norms[t] > 0; j++ {
				direction[j] = x[j] / norms[t] // N2
			}
		}
	}
	isOutlier := b.chooseOutliers(direction, s.outliers)
	for t := range tokens {
		for _, j := range b.index {
			b.outliers = append(b.outliers, stored(direction[t*d+j], typeFloat16))
		}
	}
	groups := d
	if s.token {
		groups = tokens
	}
	b.scale, b.zero = make([]float32, groups), make([]float32, groups)
	for g := range groups {
		var values []float32
		if s.token {
			for j := range d {
				if !isOutlier[j] {
					values = append(values, direction[g*d+j])
				}
			}
		} else if !isOutlier[g] {
			for t := range tokens {
				values = append(values, direction[t*d+g])
			}
		}
		b.scale[g], b.zero[g] = s.fit(values)
	}
	for i, v := range direction {
		t, j := i/d, i%d
		if !isOutlier[j] && !(s.separate && norms[t] == 0) { // N2, O1
			scale, zero := b.scaleZero(s, t, j)
			b.codes[i] = s.code(v, scale, zero)
		}
	}
	if s.separate {
		y := s.dequantize(b)
		for t := range tokens {
			factor, yt := norms[t], y[t*d:t*d+d]
			switch s.magnitude {
			case magnitudeGain:
				if length := norm(yt); length > 0 {
					factor /= length
				} else {
					factor = 0
				}
			case magnitudeLsq:
				factor = leastSquares(x[t*d:t*d+d], yt)
			}
			b.factor = append(b.factor, stored(factor, s.normType))
		}
	}
	for _, part := range [][]float32{b.scale, b.zero, b.factor, b.outliers, s.decodeBlock(b)} {
		for _, v := range part {
			if !isFinite(v) {
				return nil, errors.New("S5, M4, O1 or D3: beyond the range of a dtype")
			}
		}
	}
	return b, nil
}

// chooseOutliers sets the ascending indices of the largest channels (O1).
func (b *block) chooseOutliers(direction []float32, count int) []bool {
	peak, order := make([]float32, b.d), make([]int, b.d)
	for i, v := range direction {
		peak[i%b.d] = max(peak[i%b.d], abs(v))
	}
	for j := range order {
		order[j] = j
	}
	sort.SliceStable(order, func(i, j int) bool { return peak[order[i]] > peak[order[j]] })
	b.index = order[:min(count, b.d)]
	sort.Ints(b.index)
	isOutlier := make([]bool, b.d)
	for _, j := range b.index {
		isOutlier[j] = true
	}
	return isOutlier
}

func (b *block) scaleZero(s scheme, t, j int) (float32, float32) {
	if s.token {
		return b.scale[t], b.zero[t]
	}
	return b.scale[j], b.zero[j]
}

// fit returns the scale and zero of the directions that share them (S1, S2, S4).
func (s scheme) fit(values []float32) (float32, float32) {
	if len(values) == 0 {
		return 0, 0
	}
	lowest, highest := values[0], values[0]
	for _, v := range values {
		lowest, highest = min(lowest, v), max(highest, v)
	}
	scale, zero := s.scaleOf(lowest, highest)
	if !s.search || !isFinite(scale) || !isFinite(zero) {
		return scale, zero
	}
	least := s.squaredError(values, scale, zero)
	for _, f := range []float32{0.95, 0.9, 0.85, 0.8, 0.7} {
		low, high := f*lowest, f*highest
		if !s.symmetric {
			middle := float32(0.5*highest) + float32(0.5*lowest)
			radius := float32(0.5*highest) - float32(0.5*lowest)
			low, high = middle-float32(f*radius), middle+float32(f*radius)
		}
		newScale, newZero := s.scaleOf(low, high)
		if sum := s.squaredError(values, newScale, newZero); sum < least {
			least, scale, zero = sum, newScale, newZero
		}
	}
	return scale, zero
}

func (s scheme) scaleOf(lowest, highest float32) (float32, float32) {
	if s.symmetric {
		peak := max(abs(lowest), abs(highest))
		return stored(peak/float32(s.offset()-1), s.scaleType), 0 // S1
	}
	zero := stored(lowest, s.scaleType)
	return stored((highest-zero)/float32(int(1)<<s.bits-1), s.scaleType), zero // S2
}

func (s scheme) squaredError(values []float32, scale, zero float32) float64 {
	sum := 0.0
	for _, v := range values {
		e := float64(v - s.level(s.code(v, scale, zero), scale, zero))
		sum += e * e
	}
	return sum
}

func (s scheme) code(direction, scale, zero float32) int {
	if scale == 0 {
		return 0
	}
	lowest, highest := 0, 1<<s.bits-1
	if s.symmetric {
		highest = s.offset() - 1
		lowest = -highest
	}
	code := math.RoundToEven(float64((direction - zero) / scale)) // Q1
	return int(max(float64(lowest), min(float64(highest), code))) // Q2
}

// level is the value of a code (D1).
func (s scheme) level(code int, scale, zero float32) float32 {
	y := float32(float32(code) * scale)
	if !s.symmetric {
		y += zero
	}
	return y
}

// dequantize returns y of D1.
func (s scheme) dequantize(b *block) []float32 {
	y := make([]float32, len(b.codes))
	for i, code := range b.codes {
		scale, zero := b.scaleZero(s, i/b.d, i%b.d)
		y[i] = s.level(code, scale, zero)
	}
	for i, v := range b.outliers {
		k := len(b.index)
		y[i/k*b.d+b.index[i%k]] = v
	}
	return y
}

// decodeBlock returns x_hat of D1.
func (s scheme) decodeBlock(b *block) []float32 {
	y := s.dequantize(b)
	for t, factor := range b.factor {
		row := y[t*b.d : t*b.d+b.d]
		length := float32(1)
		if s.magnitude == magnitudeNorm {
			length = norm(row)
		}
		for j := range row {
			if length == 0 {
				row[j] = 0
			} else {
				row[j] = factor * (row[j] / length)
			}
		}
	}
	return y
}

// --- bytes -------------------------------------------------------------------------------------

// packFields appends values of some bits each, the first in the lowest bits (P1).
func packFields(packed []byte, values []int, bits, padding int) []byte {
	perByte := 8 / bits
	for j := 0; j < len(values); j += perByte {
		v := 0
		for k := range perByte {
			field := padding
			if j+k < len(values) {
				field = values[j+k]
			}
			v |= field & (1<<bits - 1) << (k * bits)
		}
		packed = append(packed, byte(v))
	}
	return packed
}

func (s scheme) packRow(packed []byte, codes []int) []byte {
	values, high := make([]int, len(codes)), make([]int, len(codes))
	for j, code := range codes {
		values[j] = code + s.offset()
		high[j] = values[j] >> 2
	}
	if s.bits != 3 {
		return packFields(packed, values, s.bits, s.offset())
	}
	packed = packFields(packed, values, 2, s.offset())
	return packFields(packed, high, 1, s.offset()>>2)
}

func (s scheme) unpackRow(packed []byte, d int) []int {
	codes := make([]int, d)
	field := func(packed []byte, j, bits int) int {
		return int(packed[j*bits/8]) >> (j * bits % 8) & (1<<bits - 1)
	}
	for j := range codes {
		if s.bits == 3 {
			codes[j] = field(packed, j, 2) | field(packed[(d+3)/4:], j, 1)<<2
		} else {
			codes[j] = field(packed, j, s.bits)
		}
		codes[j] -= s.offset()
	}
	return codes
}

// --- sequences ---------------------------------------------------------------------------------

// parts are those of one or more sequences; floats are those that are stored, widened.
type parts struct {
	packed, sinks                 []byte
	factor, scale, zero, outliers []float32
	index                         []int
}

func (p *parts) add(s scheme, b *block) {
	for t := range b.tokens {
		p.packed = s.packRow(p.packed, b.codes[t*b.d:t*b.d+b.d])
	}
	p.factor = append(p.factor, b.factor...)
	p.scale = append(p.scale, b.scale...)
	p.zero = append(p.zero, b.zero...)
	p.index = append(p.index, b.index...)
	p.outliers = append(p.outliers, b.outliers...)
}

func take[T any](from *[]T, count int) []T {
	taken := (*from)[:count]
	*from = (*from)[count:]
	return taken
}

// next takes the next block from the parts.
func (p *parts) next(s scheme, tokens, d int) *block {
	b := &block{tokens: tokens, d: d}
	for range tokens {
		b.codes = append(b.codes, s.unpackRow(take(&p.packed, s.rowBytes(d)), d)...)
	}
	groups := d
	if s.token {
		groups = tokens
	}
	b.scale, b.zero = take(&p.scale, groups), make([]float32, groups)
	if !s.symmetric {
		b.zero = take(&p.zero, groups)
	}
	if s.separate {
		b.factor = take(&p.factor, tokens)
	}
	if k := min(s.outliers, d); k > 0 {
		b.index, b.outliers = take(&p.index, k), take(&p.outliers, tokens*k)
	}
	return b
}

// frame returns the arrays of parts, for sequences of the given tokens (of which some are sinks).
func (p *parts) frame(s scheme, lead []int, tokens, d, dtype int) frame {
	shape := func(axes ...int) []int { return append(append([]int{}, lead...), axes...) }
	sinks := min(s.sinkTokens, tokens)
	coded := tokens - sinks
	size := s.blockTokens(coded)
	blocks, k := (coded+size-1)/size, min(s.outliers, d)
	groups := shape(blocks, d)
	if s.token {
		groups = shape(coded, 1)
	}
	f := frame{
		"packed": {typeUint8, shape(coded, s.rowBytes(d)), p.packed},
		"scale":  floatArray(p.scale, s.scaleType, groups...),
	}
	if s.separate {
		f["norm"] = floatArray(p.factor, s.normType, shape(coded)...)
	}
	if !s.symmetric {
		f["zero"] = floatArray(p.zero, s.scaleType, groups...)
	}
	if s.outliers > 0 {
		f["outlier_index"] = intArray(p.index, shape(blocks, k)...)
		f["outliers"] = floatArray(p.outliers, typeFloat16, shape(coded, k)...)
	}
	if s.sinkTokens > 0 {
		f["sinks"] = array{dtype, shape(sinks, d), p.sinks}
	}
	return f
}

func encode(request frame) (frame, error) {
	s, x := readScheme(request["scheme"]), request["x"]
	if x.dtype > typeBfloat16 || len(x.shape) < 2 || len(x.data) == 0 {
		return nil, errors.New("I1: not an array of floating point numbers [..., T, D]")
	}
	axes := len(x.shape) - 2
	lead, tokens, d := x.shape[:axes], x.shape[axes], x.shape[axes+1]
	values := x.floats()
	for _, v := range values {
		if !isFinite(v) {
			return nil, errors.New("I2: not finite")
		}
	}
	p, sinks := &parts{}, min(s.sinkTokens, tokens)
	size := s.blockTokens(tokens - sinks)
	for i := range product(lead) {
		first := i * tokens * d
		rowBytes := d * itemSize[x.dtype]
		p.sinks = append(p.sinks, x.data[i*tokens*rowBytes:(i*tokens+sinks)*rowBytes]...)
		for t := sinks; t < tokens; t += size {
			end := min(t+size, tokens)
			b, err := s.encodeBlock(values[first+t*d:first+end*d], d)
			if err != nil {
				return nil, err
			}
			p.add(s, b)
		}
	}
	return p.frame(s, lead, tokens, d, x.dtype), nil
}

// readDecoded decodes the parts of which the names start with prefix.
func readDecoded(request frame, s scheme, prefix string) ([]float32, []int) {
	shape := request[prefix+"shape"].ints()
	axes := len(shape) - 2
	tokens, d := shape[axes], shape[axes+1]
	p := &parts{
		packed:   request[prefix+"packed"].data,
		factor:   request[prefix+"norm"].floats(),
		scale:    request[prefix+"scale"].floats(),
		zero:     request[prefix+"zero"].floats(),
		index:    request[prefix+"outlier_index"].ints(),
		outliers: request[prefix+"outliers"].floats(),
	}
	raw := request[prefix+"sinks"].floats()
	sinks := min(s.sinkTokens, tokens)
	size := s.blockTokens(tokens - sinks)
	var xHat []float32
	for range product(shape[:axes]) {
		xHat = append(xHat, take(&raw, sinks*d)...)
		for t := sinks; t < tokens; t += size {
			xHat = append(xHat, s.decodeBlock(p.next(s, min(size, tokens-t), d))...)
		}
	}
	return xHat, shape
}

func decode(request frame) (frame, error) {
	xHat, shape := readDecoded(request, readScheme(request["scheme"]), "")
	return frame{"x_hat": floatArray(xHat, typeFloat32, shape...)}, nil
}

// --- a cache of one sequence, that grows and is cropped ----------------------------------------

type cache struct {
	s           scheme
	d, dtype    int
	sinks, tail []float32
	sealed      []*block
}

func (c *cache) add(x []float32) error {
	sinks := min(len(x), c.s.sinkTokens*c.d-len(c.sinks)) // K1
	c.sinks = append(c.sinks, x[:sinks]...)
	c.tail = append(c.tail, x[sinks:]...)
	for size := c.s.blockSize * c.d; len(c.tail) >= size; c.tail = c.tail[size:] { // B1
		b, err := c.s.encodeBlock(c.tail[:size], c.d)
		if err != nil {
			return err
		}
		c.sealed = append(c.sealed, b)
	}
	return nil
}

func (c *cache) crop(length int) { // C1
	size := c.s.blockSize * c.d
	coded := length*c.d - len(c.sinks)
	switch {
	case coded < 0:
		c.sinks, c.sealed, c.tail = c.sinks[:length*c.d], nil, nil
	case coded < len(c.sealed)*size:
		whole := coded / size
		c.tail = c.s.decodeBlock(c.sealed[whole])[:coded%size]
		for i, v := range c.tail {
			most := float32(largest(c.dtype))
			c.tail[i] = max(-most, min(most, narrow(v, c.dtype)))
		}
		c.sealed = c.sealed[:whole]
	default:
		c.tail = c.tail[:min(len(c.tail), coded-len(c.sealed)*size)]
	}
}

func stream(request frame) (frame, error) {
	s, x, steps := readScheme(request["scheme"]), request["x"], request["steps"].ints()
	if s.blockSize == 0 {
		return nil, errors.New("B1: a cache needs a number for block_size")
	}
	values := x.floats()
	for _, v := range values {
		if !isFinite(v) {
			return nil, errors.New("I2: not finite")
		}
	}
	row, rows, tokens, d := request["row"].ints()[0], x.shape[0], x.shape[1], x.shape[2]
	values = values[row*tokens*d:] // B2: the other rows are of no consequence
	c := cache{s: s, d: d, dtype: x.dtype}
	for ; len(steps) > 0; steps = steps[1+rows:] {
		if n := steps[1+row]; steps[0] == 1 {
			c.crop(n)
		} else if err := c.add(take(&values, n*d)); err != nil {
			return nil, err
		}
	}
	p := &parts{sinks: floatArray(c.sinks, x.dtype).data}
	for _, b := range c.sealed {
		p.add(s, b)
	}
	f := p.frame(s, nil, len(c.sinks)/d+len(c.sealed)*s.blockSize, d, x.dtype)
	f["tail"] = floatArray(c.tail, x.dtype, len(c.tail)/d, d)
	return f, nil
}

// --- attention ---------------------------------------------------------------------------------

func attend(request frame) (frame, error) {
	keys, keyShape := readDecoded(request, readScheme(request["scheme"]), "keys.")
	values, valueShape := readDecoded(request, readScheme(request["value_scheme"]), "values.")
	query, shape := request["query"].floats(), request["query"].shape
	scale := float64(request["scale"].floats()[0])
	softcap := float64(request["softcap"].floats()[0])
	causal := request["causal"].ints()[0] == 1
	window := request["sliding_window"].ints()[0]
	heads, queries, d := shape[0], shape[1], shape[2]
	tokens, width := keyShape[1], valueShape[2]
	var output []float32
	for i := range heads * queries {
		q, head := query[i*d:i*d+d], i/queries/(heads/keyShape[0])
		position := tokens - queries + i%queries
		first, end := 0, tokens // A2
		if causal {
			end = position + 1
		}
		if window > 0 {
			first = max(0, position+1-window)
		}
		scores, highest := make([]float64, tokens), math.Inf(-1)
		for t := first; t < end; t++ {
			for j, v := range keys[(head*tokens+t)*d:][:d] {
				scores[t] += float64(q[j]) * float64(v)
			}
			scores[t] *= scale
			if softcap > 0 {
				scores[t] = softcap * math.Tanh(scores[t]/softcap)
			}
			highest = max(highest, scores[t])
		}
		sum, row := 0.0, make([]float64, width)
		for t := first; t < end; t++ {
			weight := math.Exp(scores[t] - highest)
			sum += weight
			for j, v := range values[(head*tokens+t)*width:][:width] {
				row[j] += weight * float64(v)
			}
		}
		for _, v := range row {
			if sum > 0 {
				v /= sum
			}
			output = append(output, float32(v))
		}
	}
	return frame{"output": floatArray(output, typeFloat32, heads, queries, width)}, nil
}

// --- the program -------------------------------------------------------------------------------

var errNotImplemented = errors.New("not implemented")

func answer(request frame) (frame, error) {
	switch request["operation"].ints()[0] {
	case 0:
		return encode(request)
	case 1:
		return decode(request)
	case 2:
		return attend(request)
	case 3:
		return stream(request)
	}
	return nil, errNotImplemented
}

func main() {
	input, output := bufio.NewReader(os.Stdin), bufio.NewWriter(os.Stdout)
	_, header, err := readFrame(input)
	if err != nil {
		log.Fatal(err)
	}
	output.Write(header)
	for output.Flush(); ; output.Flush() {
		request, _, err := readFrame(input)
		if err == io.EOF {
			return
		} else if err != nil {
			log.Fatal(err)
		}
		result, err := answer(request)
		status := 0
		if err != nil {
			status, result = 1, frame{"message": {typeUint8, []int{len(err.Error())}, []byte(err.Error())}}
		}
		if err == errNotImplemented {
			status = 2
		}
		result["case"], result["status"] = request["case"], intArray([]int{status}, 1)
		writeFrame(output, result)
	}
}
