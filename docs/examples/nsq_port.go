// All schemes of NSQ-1 in Go: a program that answers `nsq check` (encode, decode, attend, stream, and
// key feedback). Ids such as N1 are rules of NSQ-1.
//
//	go build -o nsq_port nsq_port.go
//	nsq check ./nsq_port --all --feedback ./nsq_port --stream-feedback ./nsq_port
//
// Go may round a product and a sum at once, unless a conversion stands between them. Hence
// float32(a*b) wherever a sum follows; squares and products of float32 are exact in float64.
package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"log"
	"maps"
	"math"
	"math/big"
	"os"
	"slices"
)

// --- frames ------------------------------------------------------------------------------------

const (
	float32Type = iota
	float16Type
	bfloat16Type
	uint8Type
	int32Type
)

var (
	itemSize = []int{4, 2, 2, 1, 4}
	order    = binary.LittleEndian
)

type array struct {
	dtype int
	shape []int
	data  []byte
}

type frame map[string]array

type frameHead struct {
	Magic [4]byte
	Count uint32
}

type arrayHead struct {
	Name        [32]byte
	Dtype, Axes uint32
	Shape       [4]uint32
}

func product(shape []int) int {
	n := 1
	for _, size := range shape {
		n *= size
	}
	return n
}

func readFrame(input io.Reader) (frame, error) {
	var head frameHead
	if err := binary.Read(input, order, &head); err != nil {
		return nil, err
	}
	f := frame{}
	for range head.Count {
		var entry arrayHead
		if err := binary.Read(input, order, &entry); err != nil {
			return nil, err
		}
		a := array{dtype: int(entry.Dtype)}
		for _, size := range entry.Shape[:entry.Axes] {
			a.shape = append(a.shape, int(size))
		}
		a.data = make([]byte, product(a.shape)*itemSize[a.dtype])
		if _, err := io.ReadFull(input, a.data); err != nil {
			return nil, err
		}
		f[string(bytes.TrimRight(entry.Name[:], "\x00"))] = a
	}
	return f, nil
}

func writeFrame(output io.Writer, f frame) {
	binary.Write(output, order, frameHead{[4]byte{'N', 'S', 'Q', '1'}, uint32(len(f))})
	for _, name := range slices.Sorted(maps.Keys(f)) {
		a := f[name]
		entry := arrayHead{
			Dtype: uint32(a.dtype), Axes: uint32(len(a.shape)), Shape: [4]uint32{1, 1, 1, 1},
		}
		copy(entry.Name[:], name)
		for i, size := range a.shape {
			entry.Shape[i] = uint32(size)
		}
		binary.Write(output, order, entry)
		output.Write(a.data)
	}
}

func intArray(values []int, shape ...int) array {
	var data []byte
	for _, v := range values {
		data = order.AppendUint32(data, uint32(v))
	}
	return array{int32Type, shape, data}
}

func (a array) ints() []int {
	values := make([]int, len(a.data)/4)
	for i := range values {
		values[i] = int(int32(order.Uint32(a.data[4*i:])))
	}
	return values
}

// floatArray stores values that dtype holds exactly.
func floatArray(values []float32, dtype int, shape ...int) array {
	var data []byte
	for _, v := range values {
		bits, magnitude := math.Float32bits(v), math.Abs(float64(v))
		switch {
		case dtype == float32Type:
			data = order.AppendUint32(data, bits)
		case dtype == bfloat16Type:
			data = order.AppendUint16(data, uint16(bits>>16))
		case magnitude < 0x1p-14: // subnormal: a multiple of 2^-24
			data = order.AppendUint16(data, uint16(bits>>31<<15|uint32(magnitude*0x1p24)))
		default: // the bias of the exponent goes from 127 to 15
			data = order.AppendUint16(data, uint16(bits>>31<<15|(bits&0x7fffffff-112<<23)>>13))
		}
	}
	return array{dtype, shape, data}
}

// floats returns the elements as float32 (I1).
func (a array) floats() []float32 {
	values := make([]float32, len(a.data)/itemSize[a.dtype])
	for i := range values {
		item := a.data[i*itemSize[a.dtype]:]
		switch a.dtype {
		case float32Type:
			values[i] = math.Float32frombits(order.Uint32(item))
		case bfloat16Type:
			values[i] = math.Float32frombits(uint32(order.Uint16(item)) << 16)
		case float16Type:
			bits := order.Uint16(item)
			exponent, mantissa := int(bits>>10&31), float64(bits&1023)
			v := math.Ldexp(1024+mantissa, exponent-25)
			if exponent == 0 {
				v = math.Ldexp(mantissa, -24)
			} else if exponent == 31 {
				v = math.Inf(1) // NaN too: both are refused
			}
			values[i] = float32(math.Copysign(v, 0.5-float64(bits>>15)))
		}
	}
	return values
}

// --- rounding ----------------------------------------------------------------------------------

func abs(v float32) float32 { return float32(math.Abs(float64(v))) }

func isFinite(v float32) bool { return abs(v) <= math.MaxFloat32 }

func isInfinite(v float32) bool { return !isFinite(v) }

// orInfinity makes 0 of what is divided by 0 in the rules N2, Q1, M2 and D1.
func orInfinity(divisor float32) float32 {
	if divisor == 0 {
		return float32(math.Inf(1))
	}
	return divisor
}

// largest holds the largest values of float32, float16 and bfloat16.
var largest = []float64{math.MaxFloat32, 65504, 0x1.fep127}

// narrow rounds once to dtype: half to even, subnormals kept, infinity beyond the range.
func narrow(v float32, dtype int) float32 {
	if dtype == float32Type {
		return v
	}
	bits, lowest := 10, -14
	if dtype == bfloat16Type {
		bits, lowest = 7, -126
	}
	_, exponent := math.Frexp(float64(v))
	step := math.Ldexp(1, max(exponent-1, lowest)-bits)
	rounded := math.RoundToEven(float64(v)/step) * step
	if math.Abs(rounded) > largest[dtype] {
		return float32(math.Copysign(math.Inf(1), rounded))
	}
	return float32(rounded)
}

// stored narrows what is stored, which is never -0 (Z1).
func stored(v float32, dtype int) float32 { return narrow(v, dtype) + 0 }

// exactDot has the bits for every sum of products of float32, from 2^-298 to 2^256 and beyond.
func exactDot(x, y []float32) *big.Float {
	sum := new(big.Float).SetPrec(1024)
	for j := range x {
		sum.Add(sum, big.NewFloat(float64(x[j])*float64(y[j])))
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
	switch exactDot(row, row).Cmp(big.NewFloat(middle * middle)) {
	case -1:
		return lower
	case 1:
		return upper
	}
	return float32(middle) // half to even
}

// leastSquares is the exact <x, y> / <y, y>, correctly rounded (M3).
func leastSquares(x, y []float32) float32 {
	dot, _ := exactDot(x, y).Rat(nil)
	square, _ := exactDot(y, y).Rat(nil)
	if square.Sign() == 0 {
		return 0
	}
	gain, _ := dot.Quo(dot, square).Float32()
	return gain
}

// --- schemes -----------------------------------------------------------------------------------

const (
	gainMagnitude = 1
	lsqMagnitude  = 2
)

type scheme struct {
	bits                                      int
	separateNorm, perToken, symmetric, search bool
	balanced                                  bool
	magnitude, blockSize, sinkTokens, outlier int
	scaleType, normType                       int
}

func readScheme(a array) scheme {
	n := a.ints()
	return scheme{
		n[0], n[1] == 1, n[2] == 1, n[3] == 1, n[4] == 1, n[5] == 1,
		n[6], n[7], n[8], n[9], n[10], n[11],
	}
}

// offset is what is added to a code before it is packed (P1).
func (s scheme) offset() int {
	if s.symmetric {
		return 1 << (s.bits - 1)
	}
	return 0
}

// codeRange returns the least and the largest code (Q2).
func (s scheme) codeRange() (int, int) {
	if s.symmetric {
		return 1 - s.offset(), s.offset() - 1
	}
	return 0, 1<<s.bits - 1
}

func (s scheme) rowBytes(d int) int {
	if s.bits == 3 {
		return (d+3)/4 + (d+7)/8
	}
	return (d*s.bits + 7) / 8
}

// blockTokens is the number of tokens in a full block (B1).
func (s scheme) blockTokens(tokens int) int {
	if s.blockSize == 0 {
		return max(tokens, 1)
	}
	return s.blockSize
}

// --- one block ---------------------------------------------------------------------------------

// block holds the parts of one block before they are packed. Floats have the values stored.
type block struct {
	d                             int
	codes, index                  []int
	scale, zero, factor, outliers []float32
}

// feedback is what F1 takes for a key/value head.
type feedback struct {
	order  []int
	factor []float32
}

// heads returns the feedback of each key/value head; without any, of one that has none.
func heads(request frame) []*feedback {
	channels, factor := request["order"].ints(), request["factor"].floats()
	if len(channels) == 0 {
		return []*feedback{nil}
	}
	d := request["order"].shape[1]
	var all []*feedback
	for len(channels) > 0 {
		all = append(all, &feedback{take(&channels, d), take(&factor, d*d)})
	}
	return all
}

// fedBack is what F1 makes of the directions of a block.
type fedBack struct {
	w             []float32 // coded in place of them
	before, after []float32 // they, and what is left of them in w's codes, as the weights see them
}

// feedBack codes channel by channel: each error is taken from the channels that follow, and scales of
// axis channel are made of what is coded (F1).
func (s scheme) feedBack(
	b *block, direction, norms []float32, isOutlier []bool, head *feedback,
) *fedBack {
	d, w, seen := b.d, slices.Clone(direction), slices.Clone(direction)
	f := &fedBack{w, make([]float32, len(w)), make([]float32, len(w))}
	for p, j := range head.order {
		column, weight := make([]float32, len(norms)), head.factor[p*d+p]
		for t := range column {
			for _, moved := range [][]float32{w, seen} {
				if !isFinite(moved[t*d+j]) {
					moved[t*d+j] = direction[t*d+j]
				}
			}
			column[t] = w[t*d+j]
		}
		if !s.perToken && !isOutlier[j] {
			b.scale[j], b.zero[j] = s.fit(column, true)
		}
		for t, norm := range norms {
			if norm == 0 {
				continue
			}
			i := t*d + j
			g := s.scaleIndex(i, d)
			y := level(s.code(w[i], b.scale[g], b.zero[g]), b.scale[g], b.zero[g])
			if isOutlier[j] {
				y = narrow(w[i], float16Type)
			}
			e := w[i] - y
			for r := p + 1; r < d; r++ {
				later, share := t*d+head.order[r], head.factor[p*d+r]
				w[later] -= float32(e * share)
				seen[later] -= float32(seen[i] * share)
			}
			f.before[i], f.after[i] = weight*seen[i], weight*(seen[i]-e)
		}
	}
	return f
}

// lengthKept is how much longer the direction of a token is than what is coded of it (M2).
func (f *fedBack) lengthKept(t, d int) float32 {
	before, after := norm(f.before[t*d:t*d+d]), norm(f.after[t*d:t*d+d])
	if isInfinite(after) {
		return after
	}
	return before / orInfinity(after)
}

// normsAndSizes returns the norm of each token (N1), and the size by which each channel counts in it (N3).
func (s scheme) normsAndSizes(x []float32, d int) ([]float32, []float32) {
	plain, ones := slices.Repeat([]float32{1}, len(x)/d), slices.Repeat([]float32{1}, d)
	if !s.separateNorm {
		return plain, ones
	}
	plain = rowNorms(x, d)
	if !s.balanced {
		return plain, ones
	}
	sizes := make([]float32, d)
	for i, v := range x {
		sizes[i%d] = max(sizes[i%d], abs(v))
	}
	most := orInfinity(slices.Max(sizes))
	for j, peak := range sizes {
		sizes[j] = max(peak/most, 0x1p-12)
	}
	balanced := rowNorms(divided(x, sizes), d)
	if spread(x, balanced) < spread(x, plain) { // never so where a balanced norm is infinite
		return balanced, sizes
	}
	return plain, ones
}

// rowNorms returns the norm of each row of d values.
func rowNorms(x []float32, d int) []float32 {
	var norms []float32
	for row := range slices.Chunk(x, d) {
		norms = append(norms, norm(row))
	}
	return norms
}

// divided returns rows of which each value is divided by the size of its channel.
func divided(x, sizes []float32) []float32 {
	values := slices.Clone(x)
	for i := range values {
		values[i] /= sizes[i%len(sizes)]
	}
	return values
}

// directions returns tokens over their norms (N2).
func directions(x, norms []float32) []float32 {
	values, d := slices.Clone(x), len(x)/len(norms)
	for i := range values {
		values[i] /= orInfinity(norms[i/d])
	}
	return values
}

// spread is by how much norms spread the directions of a block (N3).
func spread(x, norms []float32) float64 {
	d := len(x) / len(norms)
	before, after := ranges(x, d), ranges(directions(x, norms), d)
	squares, growths := 0.0, 0.0
	for _, v := range norms {
		squares += float64(v) * float64(v)
	}
	for j, v := range after {
		if v != 0 {
			growth := float64(v / before[j])
			growths += growth * growth
		}
	}
	return squares * growths
}

// ranges returns the largest less the least value of each channel.
func ranges(x []float32, d int) []float32 {
	low, high := slices.Clone(x[:d]), slices.Clone(x[:d])
	for i, v := range x {
		low[i%d], high[i%d] = min(low[i%d], v), max(high[i%d], v)
	}
	for j := range high {
		high[j] -= low[j]
	}
	return high
}

func (s scheme) encodeBlock(x []float32, d int, head *feedback) (*block, error) {
	tokens := len(x) / d
	b := &block{d: d, codes: make([]int, len(x))}
	norms, sizes := s.normsAndSizes(x, d)
	if slices.ContainsFunc(norms, isInfinite) {
		return nil, errors.New("N1: a norm is beyond float32")
	}
	direction := directions(x, norms)
	isOutlier := b.chooseOutliers(direction, s.outlier)
	groups := make([][]float32, s.scales(tokens, d)) // the directions that share a scale
	for i, v := range direction {
		if !isOutlier[i%d] {
			g := s.scaleIndex(i, d)
			groups[g] = append(groups[g], v)
		}
	}
	for _, group := range groups {
		scale, zero := s.fit(group, false)
		b.scale, b.zero = append(b.scale, scale), append(b.zero, zero)
	}
	w, fed := direction, (*fedBack)(nil)
	if head != nil {
		fed = s.feedBack(b, direction, norms, isOutlier, head)
		w = fed.w
	}
	for i, v := range w {
		if isOutlier[i%d] { // O1
			b.outliers = append(b.outliers, stored(v, float16Type))
		} else if norms[i/d] > 0 { // N2
			g := s.scaleIndex(i, d)
			b.codes[i] = s.code(v, b.scale[g], b.zero[g])
		}
	}
	y := s.dequantize(b)
	if slices.ContainsFunc(y, isInfinite) { // where a scale, a zero or an outlier is
		return nil, errors.New("S5 or O1: a value is beyond its dtype")
	}
	if s.separateNorm {
		for t, factor := range norms { // M1
			yt := y[t*d : t*d+d]
			switch {
			case s.magnitude == gainMagnitude && fed != nil:
				factor *= fed.lengthKept(t, d) // M2
			case s.magnitude == gainMagnitude:
				factor /= orInfinity(norm(divided(yt, sizes))) // M2
			case s.magnitude == lsqMagnitude:
				factor = leastSquares(x[t*d:t*d+d], yt)
			}
			b.factor = append(b.factor, stored(factor, s.normType))
		}
	}
	for _, v := range slices.Concat(b.factor, s.decodeBlock(b)) {
		if !isFinite(v) {
			return nil, errors.New("M4 or D3: a value is beyond its dtype")
		}
	}
	return b, nil
}

// chooseOutliers sets the ascending indices of the largest channels (O1).
func (b *block) chooseOutliers(direction []float32, count int) []bool {
	peak, isOutlier := make([]float32, b.d), make([]bool, b.d)
	for i, v := range direction {
		peak[i%b.d] = max(peak[i%b.d], abs(v))
	}
	for range min(count, b.d) {
		best := -1
		for j := range peak {
			if !isOutlier[j] && (best < 0 || peak[j] > peak[best]) {
				best = j
			}
		}
		isOutlier[best] = true
		b.index = append(b.index, best)
	}
	slices.Sort(b.index)
	return isOutlier
}

// scales is the number of scales of a block.
func (s scheme) scales(tokens, d int) int {
	if s.perToken {
		return tokens
	}
	return d
}

// scaleIndex is the index of the scale that element i uses.
func (s scheme) scaleIndex(i, d int) int {
	if s.perToken {
		return i / d
	}
	return i % d
}

// fit returns the scale and zero of directions that share them (S4), or of what is coded in their
// place, of which fourth powers of errors count (F1).
func (s scheme) fit(directions []float32, fourth bool) (float32, float32) {
	if len(directions) == 0 {
		return 0, 0
	}
	lowest, highest := slices.Min(directions), slices.Max(directions)
	scale, zero := s.rangeScale(lowest, highest)
	if !s.search || !isFinite(scale) || !isFinite(zero) {
		return scale, zero
	}
	least := s.loss(directions, scale, zero, fourth)
	middle := float32(0.5*highest) + float32(0.5*lowest)
	radius := float32(0.5*highest) - float32(0.5*lowest)
	for _, f := range []float32{0.95, 0.9, 0.85, 0.8, 0.7} {
		low, high := f*lowest, f*highest
		if !s.symmetric {
			low, high = middle-float32(f*radius), middle+float32(f*radius)
		}
		newScale, newZero := s.rangeScale(low, high) // if infinite, so is the sum, or not a number
		if sum := s.loss(directions, newScale, newZero, fourth); sum < least {
			least, scale, zero = sum, newScale, newZero
		}
	}
	return scale, zero
}

func (s scheme) rangeScale(lowest, highest float32) (float32, float32) {
	_, most := s.codeRange()
	if s.symmetric {
		return stored(max(abs(lowest), abs(highest))/float32(most), s.scaleType), 0 // S1
	}
	zero := stored(lowest, s.scaleType)
	return stored((highest-zero)/float32(most), s.scaleType), zero // S2
}

func (s scheme) loss(directions []float32, scale, zero float32, fourth bool) float64 {
	sum := 0.0
	for _, v := range directions {
		e := float64(v - level(s.code(v, scale, zero), scale, zero))
		square := e * e // exact
		if fourth {
			square = float64(square * square)
		}
		sum += square
	}
	return sum
}

func (s scheme) code(direction, scale, zero float32) int {
	least, most := s.codeRange()
	rounded := math.RoundToEven(float64((direction - zero) / orInfinity(scale))) // Q1
	return int(max(float64(least), min(float64(most), rounded)))                 // Q2
}

// level is what a code stands for (D1); the zero of symmetric schemes is 0.
func level(code int, scale, zero float32) float32 { return float32(float32(code)*scale) + zero }

// dequantize returns y of D1.
func (s scheme) dequantize(b *block) []float32 {
	y := make([]float32, len(b.codes))
	for i, code := range b.codes {
		g := s.scaleIndex(i, b.d)
		y[i] = level(code, b.scale[g], b.zero[g])
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
		row, length := y[t*b.d:t*b.d+b.d], float32(1)
		if s.magnitude != gainMagnitude && s.magnitude != lsqMagnitude {
			length = orInfinity(norm(row))
		}
		for j := range row {
			row[j] = factor * (row[j] / length)
		}
	}
	return y
}

// --- bytes -------------------------------------------------------------------------------------

// pack appends some low bits of each value, the first in the lowest bits of a byte (P1).
func pack(packed []byte, values []int, bits, padding int) []byte {
	for first := 0; first < len(values); first += 8 / bits {
		b := 0
		for k := range 8 / bits {
			v := padding
			if first+k < len(values) {
				v = values[first+k]
			}
			b |= v & (1<<bits - 1) << (k * bits)
		}
		packed = append(packed, byte(b))
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
		return pack(packed, values, s.bits, s.offset())
	}
	packed = pack(packed, values, 2, s.offset())
	return pack(packed, high, 1, s.offset()>>2)
}

func field(packed []byte, j, bits int) int {
	return int(packed[j*bits/8]) >> (j * bits % 8) & (1<<bits - 1)
}

func (s scheme) unpackRow(packed []byte, d int) []int {
	codes := make([]int, d)
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

// --- encode and decode -------------------------------------------------------------------------

// parts returns what is stored for sequences of this many tokens, sinks included.
func (s scheme) parts(blocks []*block, sinks []byte, lead []int, tokens, d, dtype int) frame {
	var all block
	var packed []byte
	for _, b := range blocks {
		for row := range slices.Chunk(b.codes, d) {
			packed = s.packRow(packed, row)
		}
		all.scale, all.zero = append(all.scale, b.scale...), append(all.zero, b.zero...)
		all.factor, all.index = append(all.factor, b.factor...), append(all.index, b.index...)
		all.outliers = append(all.outliers, b.outliers...)
	}
	shape := func(axes ...int) []int { return slices.Concat(lead, axes) }
	coded := max(0, tokens-s.sinkTokens) // K1
	size := s.blockTokens(coded)
	count, k := (coded+size-1)/size, min(s.outlier, d)
	scales := shape(count, d)
	if s.perToken {
		scales = shape(coded, 1)
	}
	f := frame{
		"packed": {uint8Type, shape(coded, s.rowBytes(d)), packed},
		"scale":  floatArray(all.scale, s.scaleType, scales...),
	}
	if s.separateNorm {
		f["norm"] = floatArray(all.factor, s.normType, shape(coded)...)
	}
	if !s.symmetric {
		f["zero"] = floatArray(all.zero, s.scaleType, scales...)
	}
	if k > 0 {
		f["outlier_index"] = intArray(all.index, shape(count, k)...)
		f["outliers"] = floatArray(all.outliers, float16Type, shape(coded, k)...)
	}
	if s.sinkTokens > 0 {
		f["sinks"] = array{dtype, shape(tokens-coded, d), sinks}
	}
	return f
}

// readInput returns the elements of x, or why it is refused.
func readInput(x array) ([]float32, error) {
	axes := len(x.shape) - 2
	if x.dtype > bfloat16Type || axes < 0 || product(x.shape[axes:]) == 0 {
		return nil, errors.New("I1: not an array x[..., T, D] of floats with tokens and channels")
	}
	values := x.floats()
	for _, v := range values {
		if !isFinite(v) {
			return nil, errors.New("I2: not finite")
		}
	}
	return values, nil
}

func encode(request frame) (frame, error) {
	s, x := readScheme(request["scheme"]), request["x"]
	values, err := readInput(x)
	if err != nil {
		return nil, err
	}
	axes := len(x.shape) - 2
	tokens, d := x.shape[axes], x.shape[axes+1]
	first := min(s.sinkTokens, tokens) * d
	var blocks []*block
	var sinks []float32
	all := heads(request)
	for n := range len(values) / (tokens * d) {
		sequence := values[n*tokens*d : (n+1)*tokens*d]
		sinks = append(sinks, sequence[:first]...)
		for x := range slices.Chunk(sequence[first:], s.blockTokens(tokens)*d) {
			b, err := s.encodeBlock(x, d, all[n%len(all)])
			if err != nil {
				return nil, err
			}
			blocks = append(blocks, b)
		}
	}
	sinkBytes := floatArray(sinks, x.dtype).data
	return s.parts(blocks, sinkBytes, x.shape[:axes], tokens, d, x.dtype), nil
}

func take[T any](from *[]T, count int) []T {
	taken := (*from)[:count]
	*from = (*from)[count:]
	return taken
}

// decodeParts decodes the parts of which the names have this prefix, and returns the shape, too.
func decodeParts(request frame, prefix string, s scheme) ([]float32, []int) {
	part := func(name string) array { return request[prefix+name] }
	shape, packed, sinks := part("shape").ints(), part("packed").data, part("sinks").floats()
	all := block{
		index: part("outlier_index").ints(), outliers: part("outliers").floats(),
		scale: part("scale").floats(), zero: part("zero").floats(), factor: part("norm").floats(),
	}
	axes := len(shape) - 2
	tokens, d := shape[axes], shape[axes+1]
	var xHat []float32
	for range product(shape[:axes]) {
		rest := max(0, tokens-s.sinkTokens)
		xHat = append(xHat, take(&sinks, (tokens-rest)*d)...)
		for rest > 0 {
			n := min(rest, s.blockTokens(rest))
			scales, k := s.scales(n, d), min(s.outlier, d)
			b := &block{d: d, scale: take(&all.scale, scales), zero: make([]float32, scales)}
			if !s.symmetric {
				b.zero = take(&all.zero, scales)
			}
			if s.separateNorm {
				b.factor = take(&all.factor, n)
			}
			b.index, b.outliers = take(&all.index, k), take(&all.outliers, n*k)
			for range n {
				b.codes = append(b.codes, s.unpackRow(take(&packed, s.rowBytes(d)), d)...)
			}
			xHat = append(xHat, s.decodeBlock(b)...)
			rest -= n
		}
	}
	return xHat, shape
}

func decode(request frame) (frame, error) {
	xHat, shape := decodeParts(request, "", readScheme(request["scheme"]))
	return frame{"x_hat": floatArray(xHat, float32Type, shape...)}, nil
}

// --- a cache of one sequence -------------------------------------------------------------------

type cache struct {
	s           scheme
	head        *feedback
	d, dtype    int
	sinks, tail []float32
	sealed      []*block
}

func (c *cache) add(x []float32) error {
	sinks := min(len(x), c.s.sinkTokens*c.d-len(c.sinks)) // K1
	c.sinks = append(c.sinks, x[:sinks]...)
	c.tail = append(c.tail, x[sinks:]...)
	for size := c.s.blockSize * c.d; len(c.tail) >= size; c.tail = c.tail[size:] { // B1
		b, err := c.s.encodeBlock(c.tail[:size], c.d, c.head)
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
		whole, most := coded/size, float32(largest[c.dtype])
		c.tail = c.s.decodeBlock(c.sealed[whole])[:coded%size]
		for i, v := range c.tail {
			c.tail[i] = max(-most, min(most, narrow(v, c.dtype)))
		}
		c.sealed = c.sealed[:whole]
	default:
		c.tail = c.tail[:min(len(c.tail), coded-len(c.sealed)*size)]
	}
}

func stream(request frame) (frame, error) {
	s, x, steps := readScheme(request["scheme"]), request["x"], request["steps"].ints()
	values, err := readInput(x)
	if err == nil && s.blockSize == 0 {
		err = errors.New("B1: a cache needs a number for block_size")
	}
	if err != nil {
		return nil, err
	}
	row, rows, tokens, d := request["row"].ints()[0], x.shape[0], x.shape[1], x.shape[2]
	values = values[row*tokens*d:] // B2: other rows do not matter
	all := heads(request)
	c := cache{s: s, head: all[row%len(all)], d: d, dtype: x.dtype}
	for step := range slices.Chunk(steps, 1+rows) {
		if n := step[1+row]; step[0] == 1 {
			c.crop(n)
		} else if err := c.add(take(&values, n*d)); err != nil {
			return nil, err
		}
	}
	sinks := floatArray(c.sinks, x.dtype).data
	f := s.parts(c.sealed, sinks, nil, len(c.sinks)/d+len(c.sealed)*s.blockSize, d, x.dtype)
	f["tail"] = floatArray(c.tail, x.dtype, len(c.tail)/d, d)
	return f, nil
}

// --- attention ---------------------------------------------------------------------------------

func attend(request frame) (frame, error) {
	keys, keyShape := decodeParts(request, "keys.", readScheme(request["scheme"]))
	values, valueShape := decodeParts(request, "values.", readScheme(request["value_scheme"]))
	query, shape := request["query"].floats(), request["query"].shape
	scale := float64(request["scale"].floats()[0])
	softcap := float64(request["softcap"].floats()[0])
	causal, window := request["causal"].ints()[0], request["sliding_window"].ints()[0]
	heads, queries, d := shape[0], shape[1], shape[2]
	tokens, width := keyShape[1], valueShape[2]
	var output []float32
	for i := range heads * queries {
		first, end, position := 0, tokens, tokens-queries+i%queries // A2
		if causal == 1 {
			end = position + 1
		}
		if window > 0 {
			first = max(0, position+1-window)
		}
		head := i / queries / (heads / keyShape[0]) // A1
		scores, highest := make([]float64, tokens), math.Inf(-1)
		for t := first; t < end; t++ {
			key := keys[(head*tokens+t)*d:]
			for j, q := range query[i*d : i*d+d] {
				scores[t] += float64(q) * float64(key[j])
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
			for j := range row {
				row[j] += weight * float64(values[(head*tokens+t)*width+j])
			}
		}
		for _, v := range row {
			output = append(output, float32(v/max(sum, 1))) // sum is 0, or at least 1
		}
	}
	return frame{"output": floatArray(output, float32Type, heads, queries, width)}, nil
}

// --- the program -------------------------------------------------------------------------------

func main() {
	operations := []func(frame) (frame, error){encode, decode, attend, stream, encode, stream}
	input, output := bufio.NewReader(os.Stdin), bufio.NewWriter(os.Stdout)
	header, err := readFrame(input)
	for answer := header; err == nil; {
		writeFrame(output, answer)
		output.Flush()
		var request frame
		if request, err = readFrame(input); err != nil {
			break
		}
		result, refusal := operations[request["operation"].ints()[0]](request)
		status := 0
		if refusal != nil {
			message := refusal.Error()
			status, result = 1, frame{"message": {uint8Type, []int{len(message)}, []byte(message)}}
		}
		result["case"], result["status"] = request["case"], intArray([]int{status}, 1)
		answer = result
	}
	if err != io.EOF {
		log.Fatal(err)
	}
}
