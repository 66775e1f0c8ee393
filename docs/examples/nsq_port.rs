//! All schemes of NSQ-1 in Rust, without crates. Ids such as N1 are rules of NSQ-1.
//!
//!     rustc --edition 2021 -O nsq_port.rs    Rust 1.77 or later; nsq_port_vectors.rs lies beside it
//!     nsq check ./nsq_port --all             it answers (encode, decode, attend, stream); key feedback,
//!                                            too, with --feedback and --stream-feedback ./nsq_port
//!     ./nsq_port FOLDER                      it judges itself, by what `nsq vectors -o FOLDER` wrote
//!
//! Rust fuses no multiply-add by itself and rounds each operation once, so that the rules can be
//! written down as they stand.
use std::collections::BTreeMap;
use std::io::{self, BufWriter, Read, Write};

mod nsq_port_vectors;

// --- arrays and frames ---------------------------------------------------------------------------

pub const FLOAT32: u32 = 0;
pub const FLOAT16: u32 = 1;
pub const BFLOAT16: u32 = 2;
pub const UINT8: u32 = 3;
pub const INT32: u32 = 4;
const SIZES: [usize; 5] = [4, 2, 2, 1, 4];

#[derive(Clone)]
pub struct Array {
    pub dtype: u32,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

pub type Frame = BTreeMap<String, Array>;
pub type Refusal = String;

impl Array {
    pub fn of_floats(values: &[f32], dtype: u32, shape: &[usize]) -> Array {
        let mut data = Vec::with_capacity(values.len() * SIZES[dtype as usize]);
        for &value in values {
            let bits = value.to_bits(); // of a value that dtype holds exactly
            match dtype {
                FLOAT32 => data.extend(bits.to_le_bytes()),
                BFLOAT16 => data.extend(((bits >> 16) as u16).to_le_bytes()),
                _ => data.extend(half_bits(value).to_le_bytes()),
            }
        }
        Array { dtype, shape: shape.to_vec(), data }
    }

    pub fn of_ints(values: &[i32], shape: &[usize]) -> Array {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Array { dtype: INT32, shape: shape.to_vec(), data }
    }

    /// The elements as float32 (I1).
    pub fn floats(&self) -> Vec<f32> {
        let items = self.data.chunks_exact(SIZES[self.dtype as usize]);
        let short = |item: &[u8]| u16::from_le_bytes([item[0], item[1]]);
        match self.dtype {
            FLOAT32 => items.map(|v| f32::from_le_bytes([v[0], v[1], v[2], v[3]])).collect(),
            BFLOAT16 => items.map(|v| f32::from_bits((short(v) as u32) << 16)).collect(),
            _ => items.map(|v| widen_half(short(v))).collect(),
        }
    }

    pub fn ints(&self) -> Vec<i32> {
        let items = self.data.chunks_exact(4);
        items.map(|v| i32::from_le_bytes([v[0], v[1], v[2], v[3]])).collect()
    }

    fn sizes(&self) -> Vec<usize> {
        self.ints().iter().map(|&size| size as usize).collect()
    }
}

fn half_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let (sign, size) = ((bits >> 16 & 0x8000) as u16, bits & 0x7fff_ffff);
    if size < 0x3880_0000 {
        return sign | (value.abs() * 2f32.powi(24)) as u16; // subnormal
    }
    sign | ((size - (112 << 23)) >> 13) as u16 // the bias of the exponent goes from 127 to 15
}

fn widen_half(bits: u16) -> f32 {
    let (exponent, mantissa) = ((bits >> 10 & 31) as i32, (bits & 1023) as f32);
    let size = match exponent {
        0 => mantissa * 2f32.powi(-24),
        31 => f32::INFINITY, // NaN too: both are refused
        _ => (1024.0 + mantissa) * 2f32.powi(exponent - 25),
    };
    if bits >> 15 == 1 { -size } else { size }
}

/// The next frame; none at the end of the input.
fn read_frame(input: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut head = [0; 8];
    match input.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    let number = |bytes: &[u8], at: usize| {
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    let mut frame = Frame::new();
    for _ in 0..number(&head, 4) {
        let mut entry = [0; 56];
        input.read_exact(&mut entry)?;
        let name = String::from_utf8_lossy(&entry[..32]).trim_end_matches('\0').to_string();
        let (dtype, axes) = (number(&entry, 32), number(&entry, 36) as usize);
        let shape: Vec<usize> = (0..axes).map(|i| number(&entry, 40 + 4 * i) as usize).collect();
        let size = shape.iter().product::<usize>() * SIZES[dtype as usize];
        let mut data = vec![0; size];
        input.read_exact(&mut data)?;
        frame.insert(name, Array { dtype, shape, data });
    }
    Ok(Some(frame))
}

fn write_frame(output: &mut impl Write, frame: &Frame) -> io::Result<()> {
    output.write_all(b"NSQ1")?;
    output.write_all(&(frame.len() as u32).to_le_bytes())?;
    for (name, Array { dtype, shape, data }) in frame {
        let mut padded = [0; 32];
        padded[..name.len()].copy_from_slice(name.as_bytes());
        output.write_all(&padded)?;
        let axes = (0..4).map(|i| shape.get(i).map_or(1, |&size| size as u32));
        for number in [*dtype, shape.len() as u32].into_iter().chain(axes) {
            output.write_all(&number.to_le_bytes())?;
        }
        output.write_all(data)?;
    }
    output.flush()
}

// --- rounding ------------------------------------------------------------------------------------

/// What is divided by 0 becomes 0 in the rules N2, Q1, M2 and D1.
fn or_infinity(divisor: f32) -> f32 {
    if divisor == 0.0 { f32::INFINITY } else { divisor }
}

fn largest(dtype: u32) -> f32 {
    [f32::MAX, 65504.0, f32::from_bits(0x7f7f_0000)][dtype as usize]
}

/// One rounding to dtype: half to even, subnormals kept, infinity beyond the range.
fn narrow(value: f32, dtype: u32) -> f32 {
    if dtype == FLOAT32 || !value.is_finite() {
        return value;
    }
    let (bits, lowest) = if dtype == FLOAT16 { (10, -14) } else { (7, -126) };
    let exponent = ((value.to_bits() >> 23 & 255) as i32 - 127).max(lowest);
    let step = 2f64.powi(exponent - bits);
    let rounded = ((value as f64 / step).round_ties_even() * step) as f32;
    if rounded.abs() > largest(dtype) { f32::INFINITY.copysign(value) } else { rounded }
}

/// What is stored is never -0 (Z1).
fn stored(value: f32, dtype: u32) -> f32 {
    narrow(value, dtype) + 0.0
}

/// An exact sum of whole multiples of 2^-512, in 32 bits a limb.
struct Exact([i64; 34]);

impl Exact {
    fn new() -> Exact {
        Exact([0; 34])
    }

    /// Add the product of factors that are float32, or middles of two, times a sign.
    fn add(&mut self, factors: &[f64], sign: i64) {
        let (mut product, mut position, mut sign) = (1u128, 512, sign);
        for &factor in factors {
            let (bits, negative) = (factor.abs().to_bits(), factor < 0.0);
            if bits == 0 {
                return;
            }
            let mantissa = bits & ((1 << 52) - 1) | 1 << 52; // none is subnormal in float64
            product *= (mantissa >> mantissa.trailing_zeros()) as u128;
            position += (bits >> 52) as i32 - 1075 + mantissa.trailing_zeros() as i32;
            sign = if negative { -sign } else { sign };
        }
        product <<= position % 32;
        for limb in &mut self.0[position as usize / 32..] {
            *limb += sign * (product as u32) as i64;
            product >>= 32;
        }
    }

    fn signum(&self) -> i64 {
        let (mut carry, mut any) = (0, 0);
        for limb in self.0 {
            any |= (limb + carry) as u32;
            carry = (limb + carry) >> 32;
        }
        if carry != 0 { carry.signum() } else { (any != 0) as i64 }
    }
}

/// The middle of two neighbours; 2^128 stands for infinity.
fn middle(lower: f32, upper: f32) -> f64 {
    let most = 2f64.powi(128);
    ((lower as f64).max(-most) + (upper as f64).min(most)) / 2.0
}

/// The square root of the exact sum of squares, correctly rounded (N1).
fn norm(row: &[f32]) -> f32 {
    let sum: f64 = row.iter().map(|&v| v as f64 * v as f64).sum(); // squares are exact, their sum is not
    let (root, slack) = (sum.sqrt(), (row.len() + 8) as f64 * 2f64.powi(-53));
    let (lower, upper) = ((root * (1.0 - slack)) as f32, (root * (1.0 + slack)) as f32);
    if lower == upper {
        return lower;
    }
    // Rare: the exact sum is compared with the square of the middle of the two.
    let (middle, mut excess) = (middle(lower, upper), Exact::new());
    for &v in row {
        excess.add(&[v as f64, v as f64], 1);
    }
    excess.add(&[middle, middle], -1);
    match excess.signum() {
        0 => middle as f32, // half to even
        sign => if sign < 0 { lower } else { upper },
    }
}

/// The exact <x, y> / <y, y>, correctly rounded (M3).
fn least_squares(x: &[f32], y: &[f32]) -> f32 {
    let pairs = || x.iter().zip(y).map(|(&x, &y)| (x as f64, y as f64));
    let square: f64 = pairs().map(|(_, y)| y * y).sum();
    if square == 0.0 {
        return 0.0;
    }
    let gain = pairs().map(|(x, y)| x * y).sum::<f64>() / square;
    let sizes: f64 = pairs().map(|(x, y)| (x * y).abs()).sum();
    let slack = (y.len() + 8) as f64 * 2f64.powi(-53) * 2.0 * sizes / square;
    let (mut lower, mut upper) = ((gain - slack) as f32, (gain + slack) as f32);
    if lower.to_bits() == upper.to_bits() {
        return lower;
    }
    // Rare: the quotient is looked for among the float32, by the sign of <x, y> - g <y, y>.
    let excess = |g: f64| {
        let mut sum = Exact::new();
        for (x, y) in pairs() {
            sum.add(&[x, y], 1);
            sum.add(&[g, y, y], -1);
        }
        sum.signum()
    };
    let place = |value: f32| match value.to_bits() as i32 {
        bits if bits < 0 => i32::MIN - bits,
        bits => bits,
    };
    let at = |place: i32| f32::from_bits(if place < 0 { i32::MIN - place } else { place } as u32);
    while place(upper) - place(lower) > 1 {
        let between = at(place(lower) + (place(upper) - place(lower)) / 2);
        match excess(between as f64) {
            0 => return between + 0.0,
            sign => if sign < 0 { upper = between } else { lower = between },
        }
    }
    let middle = middle(lower, upper);
    match excess(middle) {
        0 => middle as f32,
        sign => if sign < 0 { lower } else { upper },
    }
}

// --- schemes -------------------------------------------------------------------------------------

#[derive(PartialEq)]
enum Magnitude {
    Norm,
    Gain,
    LeastSquares,
}

struct Scheme {
    bits: usize,
    separate_norm: bool,
    per_token: bool,
    symmetric: bool,
    search: bool,
    balanced: bool,
    magnitude: Magnitude,
    block_size: usize,
    sink_tokens: usize,
    outlier_channels: usize,
    scale_type: u32,
    norm_type: u32,
}

impl Scheme {
    /// The twelve numbers are those of the protocol.
    fn new(array: &Array) -> Scheme {
        let n = array.ints();
        Scheme {
            bits: n[0] as usize,
            separate_norm: n[1] == 1,
            per_token: n[2] == 1,
            symmetric: n[3] == 1,
            search: n[4] == 1,
            balanced: n[5] == 1,
            magnitude: [Magnitude::Norm, Magnitude::Gain, Magnitude::LeastSquares]
                .into_iter().nth(n[6] as usize).expect("a magnitude"),
            block_size: if n[7] == 0 { usize::MAX } else { n[7] as usize },
            sink_tokens: n[8] as usize,
            outlier_channels: n[9] as usize,
            scale_type: n[10] as u32,
            norm_type: n[11] as u32,
        }
    }

    /// What is added to a code before it is packed (P1).
    fn offset(&self) -> i32 {
        if self.symmetric { 1 << (self.bits - 1) } else { 0 }
    }

    /// The least and the largest code (Q2).
    fn code_range(&self) -> (i32, i32) {
        let most = (1 << self.bits) - 1 - self.offset();
        (if self.symmetric { -most } else { 0 }, most)
    }

    fn row_bytes(&self, d: usize) -> usize {
        match self.bits {
            3 => d.div_ceil(4) + d.div_ceil(8),
            bits => (d * bits).div_ceil(8),
        }
    }

    /// How many scales a block has, and which of them element i uses.
    fn scales(&self, tokens: usize, d: usize) -> usize {
        if self.per_token { tokens } else { d }
    }

    fn scale_index(&self, i: usize, d: usize) -> usize {
        if self.per_token { i / d } else { i % d }
    }

    fn scale_of(&self, lowest: f32, highest: f32) -> (f32, f32) {
        let most = self.code_range().1 as f32;
        if self.symmetric {
            return (stored(lowest.abs().max(highest.abs()) / most, self.scale_type), 0.0); // S1
        }
        let zero = stored(lowest, self.scale_type);
        (stored((highest - zero) / most, self.scale_type), zero) // S2
    }

    fn code(&self, direction: f32, scale: f32, zero: f32) -> i32 {
        let (least, most) = self.code_range();
        let quotient = (direction - zero) / or_infinity(scale); // Q1
        quotient.round_ties_even().max(least as f32).min(most as f32) as i32 // Q2
    }

    /// What a code stands for (D1).
    fn level(&self, code: i32, scale: f32, zero: f32) -> f32 {
        let y = code as f32 * scale;
        if self.symmetric { y } else { y + zero }
    }

    fn loss(&self, directions: &[f32], (scale, zero): (f32, f32), fourth: bool) -> f64 {
        let error = |v: f32| (v - self.level(self.code(v, scale, zero), scale, zero)) as f64;
        let squares = directions.iter().map(|&v| error(v) * error(v)); // exact
        squares.fold(0.0, |sum, square| sum + if fourth { square * square } else { square })
    }

    /// The scale and zero of directions that share them (S4), or of what is coded in their place, of which
    /// fourth powers of errors count (F1).
    fn fit(&self, directions: &[f32], fourth: bool) -> (f32, f32) {
        if directions.is_empty() {
            return (0.0, 0.0);
        }
        let lowest = directions.iter().copied().fold(f32::INFINITY, f32::min);
        let highest = directions.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut best = self.scale_of(lowest, highest);
        let is_finite = |(scale, zero): (f32, f32)| scale.is_finite() && zero.is_finite();
        if !self.search || !is_finite(best) {
            return best;
        }
        let mut least = self.loss(directions, best, fourth);
        let middle = 0.5 * highest + 0.5 * lowest;
        let radius = 0.5 * highest - 0.5 * lowest;
        for f in [0.95f32, 0.9, 0.85, 0.8, 0.7] {
            let shrunk = match self.symmetric {
                true => self.scale_of(f * lowest, f * highest),
                false => self.scale_of(middle - f * radius, middle + f * radius),
            };
            if is_finite(shrunk) {
                let sum = self.loss(directions, shrunk, fourth);
                if sum < least {
                    (least, best) = (sum, shrunk);
                }
            }
        }
        best
    }
}

// --- one block -----------------------------------------------------------------------------------

/// The parts of one block, before codes are packed; floats have the values that are stored.
#[derive(Clone, Default)]
struct Block {
    d: usize,
    codes: Vec<i32>,
    index: Vec<i32>,
    scale: Vec<f32>,
    zero: Vec<f32>,
    factor: Vec<f32>,
    outliers: Vec<f32>,
}

/// The ascending indices of the outlier channels (O1).
fn choose_outliers(direction: &[f32], d: usize, count: usize) -> Vec<i32> {
    let mut peak = vec![0f32; d];
    for (i, v) in direction.iter().enumerate() {
        peak[i % d] = peak[i % d].max(v.abs());
    }
    let mut ranked: Vec<usize> = (0..d).collect();
    ranked.sort_by(|&a, &b| peak[b].total_cmp(&peak[a]).then(a.cmp(&b)));
    ranked.truncate(count);
    ranked.sort();
    ranked.into_iter().map(|j| j as i32).collect()
}

/// What F1 takes for a key/value head.
struct Head {
    order: Vec<usize>,
    factor: Vec<f32>,
}

/// The feedback of each key/value head; that of one head that has none, where the request brings none.
fn heads_of(request: &Frame) -> Vec<Option<Head>> {
    let (Some(order), Some(factor)) = (request.get("order"), request.get("factor")) else { return vec![None] };
    let (channels, shares, d) = (order.sizes(), factor.floats(), order.shape[1]);
    let pairs = channels.chunks_exact(d).zip(shares.chunks_exact(d * d));
    pairs.map(|(order, factor)| Some(Head { order: order.to_vec(), factor: factor.to_vec() })).collect()
}

/// What F1 makes of the directions of a block.
struct FedBack {
    w: Vec<f32>,      // coded in place of them
    before: Vec<f32>, // they, as the weights see them
    after: Vec<f32>,  // what is left of them in the codes, seen so
}

impl FedBack {
    /// How much longer the direction of token t is than what is left of it (M2).
    fn length_kept(&self, t: usize, d: usize) -> f32 {
        let (before, after) = (norm(&self.before[t * d..][..d]), norm(&self.after[t * d..][..d]));
        if after.is_infinite() { after } else { before / or_infinity(after) }
    }
}

/// Code channel by channel: each error is taken from the channels that follow, and scales of axis channel
/// are made of what is coded (F1).
fn feed_back(
    s: &Scheme, block: &mut Block, direction: &[f32], norms: &[f32], is_outlier: &[bool], head: &Head,
) -> FedBack {
    let d = block.d;
    let (mut w, mut seen) = (direction.to_vec(), direction.to_vec());
    let (mut before, mut after) = (vec![0f32; w.len()], vec![0f32; w.len()]);
    for (p, &j) in head.order.iter().enumerate() {
        for moved in [&mut w, &mut seen] {
            for (v, &plain) in moved[j..].iter_mut().zip(&direction[j..]).step_by(d) {
                *v = if v.is_finite() { *v } else { plain };
            }
        }
        if !s.per_token && !is_outlier[j] {
            let column: Vec<f32> = w[j..].iter().copied().step_by(d).collect();
            (block.scale[j], block.zero[j]) = s.fit(&column, true);
        }
        for t in (0..norms.len()).filter(|&t| norms[t] > 0.0) {
            let i = t * d + j;
            let (scale, zero) = (block.scale[s.scale_index(i, d)], block.zero[s.scale_index(i, d)]);
            let y = match is_outlier[j] {
                true => narrow(w[i], FLOAT16),
                false => s.level(s.code(w[i], scale, zero), scale, zero),
            };
            let (error, visible) = (w[i] - y, seen[i]);
            for r in p + 1..d {
                let (later, share) = (t * d + head.order[r], head.factor[p * d + r]);
                w[later] -= error * share;
                seen[later] -= visible * share;
            }
            let weight = head.factor[p * d + p];
            (before[i], after[i]) = (weight * visible, weight * (visible - error));
        }
    }
    FedBack { w, before, after }
}

/// Rows of which each value is divided by the size of its channel.
fn divided(x: &[f32], sizes: &[f32]) -> Vec<f32> {
    x.iter().zip(sizes.iter().cycle()).map(|(v, size)| v / size).collect()
}

/// Tokens over their norms (N2).
fn directions(x: &[f32], norms: &[f32], d: usize) -> Vec<f32> {
    x.iter().enumerate().map(|(i, v)| v / or_infinity(norms[i / d])).collect()
}

/// The largest less the least value of each channel.
fn ranges(x: &[f32], d: usize) -> Vec<f32> {
    let (mut low, mut high) = (x[..d].to_vec(), x[..d].to_vec());
    for (i, &v) in x.iter().enumerate() {
        (low[i % d], high[i % d]) = (low[i % d].min(v), high[i % d].max(v));
    }
    high.iter().zip(low).map(|(high, low)| high - low).collect()
}

/// By how much norms spread the directions of a block (N3).
fn spread(x: &[f32], norms: &[f32], d: usize) -> f64 {
    let (before, after) = (ranges(x, d), ranges(&directions(x, norms, d), d));
    let growth = |(&after, before): (&f32, f32)| if after == 0.0 { 0.0 } else { after / before };
    let growths: Vec<f32> = after.iter().zip(before).map(growth).collect();
    let squares = |values: &[f32]| values.iter().fold(0.0, |sum, &v| sum + v as f64 * v as f64);
    squares(norms) * squares(&growths)
}

/// The norm of each token (N1), and the size by which each channel counts in it (N3).
fn norms_and_sizes(s: &Scheme, x: &[f32], d: usize) -> (Vec<f32>, Vec<f32>) {
    let ones = vec![1f32; d];
    if !s.separate_norm {
        return (vec![1f32; x.len() / d], ones);
    }
    let norms = |x: &[f32]| x.chunks_exact(d).map(norm).collect::<Vec<f32>>();
    let plain = norms(x);
    if !s.balanced {
        return (plain, ones);
    }
    let peak = |j: usize| x[j..].iter().step_by(d).fold(0f32, |most, v| most.max(v.abs()));
    let peaks: Vec<f32> = (0..d).map(peak).collect();
    let most = or_infinity(peaks.iter().copied().fold(0.0, f32::max));
    let sizes: Vec<f32> = peaks.iter().map(|peak| (peak / most).max(2f32.powi(-12))).collect();
    let balanced = norms(&divided(x, &sizes));
    let gains = spread(x, &balanced, d) < spread(x, &plain, d); // never so where a balanced norm is infinite
    if gains { (balanced, sizes) } else { (plain, ones) }
}

fn encode_block(s: &Scheme, x: &[f32], d: usize, head: Option<&Head>) -> Result<Block, Refusal> {
    let tokens = x.len() / d;
    let (norms, sizes) = norms_and_sizes(s, x, d);
    if norms.iter().any(|v| v.is_infinite()) {
        return Err("N1: a norm is beyond float32".into());
    }
    let direction = directions(x, &norms, d);
    let index = choose_outliers(&direction, d, s.outlier_channels);
    let is_outlier: Vec<bool> = (0..d).map(|j| index.contains(&(j as i32))).collect();
    let mut block = Block { d, index, codes: vec![0; x.len()], ..Block::default() };
    let mut groups = vec![Vec::new(); s.scales(tokens, d)]; // the directions that share a scale
    for (i, &v) in direction.iter().enumerate() {
        if !is_outlier[i % d] {
            groups[s.scale_index(i, d)].push(v);
        }
    }
    (block.scale, block.zero) = groups.iter().map(|group| s.fit(group, false)).unzip();
    let fed = head.map(|head| feed_back(s, &mut block, &direction, &norms, &is_outlier, head));
    let w = fed.as_ref().map_or(&direction, |fed| &fed.w);
    for (i, &v) in w.iter().enumerate() {
        if is_outlier[i % d] {
            block.outliers.push(stored(v, FLOAT16));
        } else if norms[i / d] > 0.0 {
            let g = s.scale_index(i, d);
            block.codes[i] = s.code(v, block.scale[g], block.zero[g]);
        }
    }
    let beyond = |values: &[f32]| values.iter().any(|v| !v.is_finite());
    let y = dequantize(s, &block); // finite if scales, zeros and outliers are
    if beyond(&y) {
        return Err("S5 or O1: a value is beyond its dtype".into());
    }
    if s.separate_norm {
        for (t, (x, y)) in x.chunks_exact(d).zip(y.chunks_exact(d)).enumerate() {
            let factor = match (&s.magnitude, &fed) {
                (Magnitude::Norm, _) => norms[t], // M1
                (Magnitude::Gain, None) => norms[t] / or_infinity(norm(&divided(y, &sizes))), // M2
                (Magnitude::Gain, Some(fed)) => norms[t] * fed.length_kept(t, d),
                (Magnitude::LeastSquares, _) => least_squares(x, y),
            };
            block.factor.push(stored(factor, s.norm_type));
        }
    }
    if beyond(&block.factor) || beyond(&decode_block(s, &block)) {
        return Err("M4 or D3: a value is beyond its dtype".into());
    }
    Ok(block)
}

/// y of D1.
fn dequantize(s: &Scheme, block: &Block) -> Vec<f32> {
    let (d, k) = (block.d, block.index.len());
    let level = |(i, &code): (usize, &i32)| {
        let g = s.scale_index(i, d);
        s.level(code, block.scale[g], block.zero[g])
    };
    let mut y: Vec<f32> = block.codes.iter().enumerate().map(level).collect();
    for (i, &v) in block.outliers.iter().enumerate() {
        y[i / k * d + block.index[i % k] as usize] = v;
    }
    y
}

/// x_hat of D1.
fn decode_block(s: &Scheme, block: &Block) -> Vec<f32> {
    let mut y = dequantize(s, block);
    for (row, &factor) in y.chunks_exact_mut(block.d).zip(&block.factor) {
        let length = if s.magnitude == Magnitude::Norm { or_infinity(norm(row)) } else { 1.0 };
        row.iter_mut().for_each(|v| *v = factor * (*v / length));
    }
    y
}

// --- bytes (P1) ----------------------------------------------------------------------------------

/// Some low bits of each value of a row, the first in the lowest bits of a byte.
fn pack(packed: &mut Vec<u8>, values: &[i32], bits: usize, padding: i32) {
    for chunk in values.chunks(8 / bits) {
        let values = chunk.iter().chain(std::iter::repeat(&padding)).take(8 / bits);
        let field = |(k, v): (usize, &i32)| (v & ((1 << bits) - 1)) << (k * bits);
        packed.push(values.enumerate().map(field).sum::<i32>() as u8);
    }
}

fn pack_row(s: &Scheme, packed: &mut Vec<u8>, codes: &[i32]) {
    let values: Vec<i32> = codes.iter().map(|code| code + s.offset()).collect();
    if s.bits != 3 {
        return pack(packed, &values, s.bits, s.offset());
    }
    let high: Vec<i32> = values.iter().map(|v| v >> 2).collect();
    pack(packed, &values, 2, s.offset());
    pack(packed, &high, 1, s.offset() >> 2);
}

fn unpack_row(s: &Scheme, row: &[u8], d: usize) -> Vec<i32> {
    let field = |row: &[u8], j: usize, bits: usize| {
        row[j * bits / 8] as i32 >> (j * bits % 8) & ((1 << bits) - 1)
    };
    let value = |j| match s.bits {
        3 => field(row, j, 2) | field(&row[d.div_ceil(4)..], j, 1) << 2,
        bits => field(row, j, bits),
    };
    (0..d).map(|j| value(j) - s.offset()).collect()
}

// --- encode and decode ---------------------------------------------------------------------------

/// What is stored for sequences of this many tokens, sinks included; d and dtype are those of x.
fn parts_of(
    s: &Scheme, blocks: &[Block], sinks: &[f32], lead: &[usize], tokens: usize, d: usize, dtype: u32,
) -> Frame {
    let coded = tokens.saturating_sub(s.sink_tokens); // K1
    let count = coded.div_ceil(s.block_size.min(coded).max(1)); // B1
    let k = s.outlier_channels.min(d);
    let shape = |axes: &[usize]| [lead, axes].concat();
    let all = |part: fn(&Block) -> &Vec<f32>| blocks.iter().flat_map(part).copied().collect::<Vec<_>>();
    let mut packed = Vec::new();
    for row in blocks.iter().flat_map(|block| block.codes.chunks_exact(d)) {
        pack_row(s, &mut packed, row);
    }
    let scales = if s.per_token { shape(&[coded, 1]) } else { shape(&[count, d]) };
    let mut frame = Frame::new();
    let mut keep = |name: &str, array| frame.insert(name.to_string(), array);
    keep("packed", Array { dtype: UINT8, shape: shape(&[coded, s.row_bytes(d)]), data: packed });
    keep("scale", Array::of_floats(&all(|b| &b.scale), s.scale_type, &scales));
    if s.separate_norm {
        keep("norm", Array::of_floats(&all(|b| &b.factor), s.norm_type, &shape(&[coded])));
    }
    if !s.symmetric {
        keep("zero", Array::of_floats(&all(|b| &b.zero), s.scale_type, &scales));
    }
    if k > 0 {
        let index: Vec<i32> = blocks.iter().flat_map(|b| &b.index).copied().collect();
        keep("outlier_index", Array::of_ints(&index, &shape(&[count, k])));
        keep("outliers", Array::of_floats(&all(|b| &b.outliers), FLOAT16, &shape(&[coded, k])));
    }
    if s.sink_tokens > 0 {
        keep("sinks", Array::of_floats(sinks, dtype, &shape(&[tokens - coded, d])));
    }
    frame
}

fn read_input(x: &Array) -> Result<Vec<f32>, Refusal> {
    let axes = x.shape.len();
    if x.dtype > BFLOAT16 || axes < 2 || x.shape[axes - 2..].contains(&0) {
        return Err("I1: not an array x[..., T, D] of floats with tokens and channels".into());
    }
    let values = x.floats();
    match values.iter().all(|v| v.is_finite()) {
        true => Ok(values),
        false => Err("I2: not finite".into()),
    }
}

fn encode(request: &Frame) -> Result<Frame, Refusal> {
    let (s, x) = (Scheme::new(&request["scheme"]), &request["x"]);
    let values = read_input(x)?;
    let (lead, last) = x.shape.split_at(x.shape.len() - 2);
    let (tokens, d) = (last[0], last[1]);
    let first = s.sink_tokens.min(tokens) * d;
    let (mut blocks, mut sinks) = (Vec::new(), Vec::new());
    let heads = heads_of(request);
    for (sequence, head) in values.chunks_exact(tokens * d).zip(heads.iter().cycle()) {
        sinks.extend(&sequence[..first]);
        for x in sequence[first..].chunks(s.block_size.min(tokens) * d) {
            blocks.push(encode_block(&s, x, d, head.as_ref())?);
        }
    }
    Ok(parts_of(&s, &blocks, &sinks, lead, tokens, d, x.dtype))
}

fn take<T: Clone>(from: &mut &[T], count: usize) -> Vec<T> {
    let (taken, rest) = from.split_at(count);
    *from = rest;
    taken.to_vec()
}

/// Decode the parts of which the names have this prefix; return the shape, too.
fn decode_parts(request: &Frame, prefix: &str, s: &Scheme) -> (Vec<f32>, Vec<usize>) {
    let part = |name: &str| request.get(&format!("{prefix}{name}"));
    let floats = |name: &str| part(name).map_or(Vec::new(), Array::floats);
    let (scale, zero, factor) = (floats("scale"), floats("zero"), floats("norm"));
    let (outliers, sinks) = (floats("outliers"), floats("sinks"));
    let index = part("outlier_index").map_or(Vec::new(), Array::ints);
    let (mut scale, mut zero, mut factor) = (&scale[..], &zero[..], &factor[..]);
    let (mut outliers, mut sinks, mut index) = (&outliers[..], &sinks[..], &index[..]);
    let mut packed = part("packed").map_or(&[][..], |array| &array.data);
    let shape = part("shape").expect("a shape").sizes();
    let (tokens, d) = (shape[shape.len() - 2], shape[shape.len() - 1]);
    let (coded, k) = (tokens.saturating_sub(s.sink_tokens), s.outlier_channels.min(d));
    let mut x_hat = Vec::new();
    for _ in 0..shape[..shape.len() - 2].iter().product() {
        x_hat.extend(take(&mut sinks, (tokens - coded) * d));
        let mut rest = coded;
        while rest > 0 {
            let n = rest.min(s.block_size);
            let scales = s.scales(n, d);
            let mut block = Block { d, scale: take(&mut scale, scales), ..Block::default() };
            block.zero = if s.symmetric { vec![0.0; scales] } else { take(&mut zero, scales) };
            block.factor = take(&mut factor, if s.separate_norm { n } else { 0 });
            block.index = take(&mut index, k);
            block.outliers = take(&mut outliers, n * k);
            for _ in 0..n {
                block.codes.extend(unpack_row(s, &take(&mut packed, s.row_bytes(d)), d));
            }
            x_hat.extend(decode_block(s, &block));
            rest -= n;
        }
    }
    (x_hat, shape)
}

fn decode(request: &Frame) -> Result<Frame, Refusal> {
    let (x_hat, shape) = decode_parts(request, "", &Scheme::new(&request["scheme"]));
    Ok(Frame::from([("x_hat".into(), Array::of_floats(&x_hat, FLOAT32, &shape))]))
}

// --- a cache of one sequence ---------------------------------------------------------------------

fn stream(request: &Frame) -> Result<Frame, Refusal> {
    let (s, x) = (Scheme::new(&request["scheme"]), &request["x"]);
    let values = read_input(x)?;
    if s.block_size == usize::MAX {
        return Err("B1: a cache needs a number for block_size".into());
    }
    let (rows, tokens, d) = (x.shape[0], x.shape[1], x.shape[2]);
    let (row, size, heads) = (request["row"].sizes()[0], s.block_size * d, heads_of(request));
    let head = heads[row % heads.len()].as_ref();
    let mut next = &values[row * tokens * d..]; // B2: other rows do not matter
    let (mut sinks, mut sealed, mut tail): (Vec<f32>, Vec<Block>, Vec<f32>) = Default::default();
    for step in request["steps"].sizes().chunks_exact(1 + rows) {
        let count = step[1 + row] * d;
        if step[0] == 0 {
            let mut added = take(&mut next, count);
            sinks.extend(added.drain(..(s.sink_tokens * d - sinks.len()).min(count))); // K1
            tail.extend(added);
            while tail.len() >= size {
                sealed.push(encode_block(&s, &tail.drain(..size).collect::<Vec<_>>(), d, head)?); // B1
            }
        } else if count < sinks.len() { // C1
            sinks.truncate(count);
            (sealed, tail) = Default::default();
        } else if count - sinks.len() < sealed.len() * size {
            let (whole, rest) = ((count - sinks.len()) / size, (count - sinks.len()) % size);
            let most = largest(x.dtype);
            tail = decode_block(&s, &sealed[whole]);
            tail.truncate(rest);
            tail.iter_mut().for_each(|v| *v = narrow(*v, x.dtype).clamp(-most, most));
            sealed.truncate(whole);
        } else {
            tail.truncate(count - sinks.len() - sealed.len() * size);
        }
    }
    let kept = sinks.len() / d + sealed.len() * s.block_size;
    let mut frame = parts_of(&s, &sealed, &sinks, &[], kept, d, x.dtype);
    frame.insert("tail".into(), Array::of_floats(&tail, x.dtype, &[tail.len() / d, d]));
    Ok(frame)
}

// --- attention -----------------------------------------------------------------------------------

fn attend(request: &Frame) -> Result<Frame, Refusal> {
    let (keys, key_shape) = decode_parts(request, "keys.", &Scheme::new(&request["scheme"]));
    let (values, value_shape) = decode_parts(request, "values.", &Scheme::new(&request["value_scheme"]));
    let query = request["query"].floats();
    let (scale, softcap) = (request["scale"].floats()[0] as f64, request["softcap"].floats()[0] as f64);
    let (causal, window) = (request["causal"].ints()[0] == 1, request["sliding_window"].sizes()[0]);
    let [heads, queries, d] = request["query"].shape[..] else { return Err("not [H, m, D]".into()) };
    let (kv_heads, tokens, width) = (key_shape[0], key_shape[1], value_shape[2]);
    let mut output = Vec::with_capacity(heads * queries * width);
    for (i, q) in query.chunks_exact(d).enumerate() {
        let position = tokens - queries + i % queries; // A2
        let end = if causal { position + 1 } else { tokens };
        let first = if window > 0 { (position + 1).saturating_sub(window) } else { 0 };
        let head = i / queries / (heads / kv_heads); // A1
        let score = |t: usize| {
            let key = &keys[(head * tokens + t) * d..][..d];
            let score = q.iter().zip(key).map(|(&q, &k)| q as f64 * k as f64).sum::<f64>() * scale;
            if softcap > 0.0 { softcap * (score / softcap).tanh() } else { score }
        };
        let scores: Vec<f64> = (first..end).map(score).collect();
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (mut sum, mut row) = (0.0, vec![0f64; width]);
        for (t, score) in (first..end).zip(scores) {
            let weight = (score - highest).exp();
            sum += weight;
            for (total, &v) in row.iter_mut().zip(&values[(head * tokens + t) * width..]) {
                *total += weight * v as f64;
            }
        }
        output.extend(row.iter().map(|total| (total / f64::max(sum, 1.0)) as f32)); // sum: 0, or 1 at least
    }
    Ok(Frame::from([("output".into(), Array::of_floats(&output, FLOAT32, &[heads, queries, width]))]))
}

// --- the program ---------------------------------------------------------------------------------

pub const OPERATIONS: [(&str, fn(&Frame) -> Result<Frame, Refusal>); 6] = [
    ("encode", encode), ("decode", decode), ("attend", attend), ("stream", stream),
    ("feedback", encode), ("stream_feedback", stream),
];

fn serve() -> io::Result<()> {
    let (mut input, mut output) = (io::stdin().lock(), BufWriter::new(io::stdout().lock()));
    let Some(header) = read_frame(&mut input)? else { return Ok(()) };
    write_frame(&mut output, &header)?;
    while let Some(request) = read_frame(&mut input)? {
        let (status, mut answer) = match OPERATIONS[request["operation"].sizes()[0]].1(&request) {
            Ok(result) => (0, result),
            Err(why) => {
                let message = Array { dtype: UINT8, shape: vec![why.len()], data: why.into_bytes() };
                (1, Frame::from([("message".into(), message)]))
            }
        };
        answer.insert("case".into(), request["case"].clone());
        answer.insert("status".into(), Array::of_ints(&[status], &[1]));
        write_frame(&mut output, &answer)?;
    }
    Ok(())
}

fn main() -> io::Result<()> {
    match std::env::args().nth(1) {
        Some(folder) => nsq_port_vectors::judge(&folder),
        None => serve(),
    }
}
