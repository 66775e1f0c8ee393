//! How nsq_port.rs judges itself: by the files of `nsq vectors`, in JSON and as safetensors.
//!
//! Compare the files with the hashes of manifest.json by sha256sum: Rust brings none.
use crate::{Array, Frame, BFLOAT16, FLOAT16, FLOAT32, INT32, OPERATIONS, UINT8};
use std::collections::HashMap;
use std::{fs, io, process};

// --- JSON, as far as these files need it ---------------------------------------------------------

enum Json {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Json>),
    Object(HashMap<String, Json>),
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn peek(&mut self) -> u8 {
        while self.text[self.at].is_ascii_whitespace() {
            self.at += 1;
        }
        self.text[self.at]
    }

    /// Whether the next sign is this one, which is then passed.
    fn is(&mut self, sign: u8) -> bool {
        let found = self.peek() == sign;
        self.at += found as usize;
        found
    }

    fn word(&mut self, word: &str, value: Json) -> Json {
        assert!(self.text[self.at..].starts_with(word.as_bytes()), "no JSON at byte {}", self.at);
        self.at += word.len();
        value
    }

    fn string(&mut self) -> String {
        assert!(self.is(b'"'), "no string at byte {}", self.at);
        let mut bytes = Vec::new();
        while self.text[self.at] != b'"' {
            self.at += (self.text[self.at] == b'\\') as usize; // no name here has an escape
            bytes.push(self.text[self.at]);
            self.at += 1;
        }
        self.at += 1;
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn value(&mut self) -> Json {
        match self.peek() {
            b'{' => {
                let mut object = HashMap::new();
                self.at += 1;
                while !self.is(b'}') {
                    let name = self.string();
                    assert!(self.is(b':'), "no colon at byte {}", self.at);
                    object.insert(name, self.value());
                    self.is(b',');
                }
                Json::Object(object)
            }
            b'[' => {
                let mut list = Vec::new();
                self.at += 1;
                while !self.is(b']') {
                    list.push(self.value());
                    self.is(b',');
                }
                Json::List(list)
            }
            b'"' => Json::Text(self.string()),
            b't' => self.word("true", Json::Bool(true)),
            b'f' => self.word("false", Json::Bool(false)),
            b'n' => self.word("null", Json::Null),
            _ => {
                let rest = &self.text[self.at..];
                let size = rest.iter().take_while(|sign| b"+-.0123456789eE".contains(sign)).count();
                self.at += size;
                let text = String::from_utf8_lossy(&rest[..size]);
                Json::Number(text.parse().expect("a number"))
            }
        }
    }
}

impl Json {
    fn read(text: &[u8]) -> Json {
        Reader { text, at: 0 }.value()
    }

    fn object(&self) -> &HashMap<String, Json> {
        match self {
            Json::Object(object) => object,
            _ => panic!("no object"),
        }
    }

    fn get(&self, name: &str) -> &Json {
        self.object().get(name).unwrap_or_else(|| panic!("there is no {name}"))
    }

    fn text(&self) -> &str {
        match self {
            Json::Text(text) => text,
            _ => "",
        }
    }

    fn number(&self) -> i32 {
        match self {
            Json::Number(number) => *number as i32,
            Json::Bool(value) => *value as i32,
            _ => 0, // null: no block size
        }
    }

    fn sizes(&self) -> Vec<usize> {
        match self {
            Json::List(list) => list.iter().map(|one| one.number() as usize).collect(),
            _ => panic!("no list"),
        }
    }
}

// --- the files -----------------------------------------------------------------------------------

fn dtype_of(name: &str) -> u32 {
    match name {
        "float32" | "F32" => FLOAT32,
        "float16" | "F16" => FLOAT16,
        "bfloat16" | "BF16" => BFLOAT16,
        "uint8" | "U8" => UINT8,
        "int32" | "I32" => INT32,
        _ => u32::MAX, // float64: outputs of attention, which are read by their bytes
    }
}

fn array_of(object: &Json) -> Array {
    let digit = |sign: u8| (sign as char).to_digit(16).expect("hexadecimal") as u8;
    let pairs = object.get("data").text().as_bytes().chunks_exact(2);
    let data = pairs.map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect();
    let (dtype, shape) = (dtype_of(object.get("dtype").text()), object.get("shape").sizes());
    Array { dtype, shape, data }
}

fn arrays_of(objects: &Json) -> Frame {
    objects.object().iter().map(|(name, one)| (name.clone(), array_of(one))).collect()
}

/// The twelve numbers of a scheme whose fields have names.
fn numbers_of(scheme: &Json) -> Array {
    let place = |field: &str, names: &[&str]| {
        let name = scheme.get(field).text();
        names.iter().position(|one| *one == name).expect(field) as i32
    };
    let number = |field: &str| scheme.get(field).number();
    let dtypes = ["float32", "float16", "bfloat16"];
    let numbers = [
        number("bits"), number("separate_norm"), place("axis", &["channel", "token"]), number("symmetric"),
        place("scale_rule", &["range", "search"]), place("norm_rule", &["plain", "balanced"]),
        place("magnitude", &["norm", "gain", "lsq"]), number("block_size"), number("sink_tokens"), number("outlier_channels"),
        place("scale_dtype", &dtypes), place("norm_dtype", &dtypes),
    ];
    Array::of_ints(&numbers, &[12])
}

/// Whether what is returned has these bytes; attention may be off by its tolerance (A3).
fn agrees(result: &Frame, expected: &Frame) -> bool {
    let Some(tolerance) = expected.get("tolerance") else {
        return expected.iter().all(|(name, array)| result[name].data == array.data);
    };
    let doubles = |array: &Array| -> Vec<f64> {
        array.data.chunks_exact(8).map(|v| f64::from_le_bytes(v.try_into().expect("8 bytes"))).collect()
    };
    let wanted = doubles(&expected["output"]).into_iter().zip(doubles(tolerance));
    let mut got = result["output"].floats().into_iter().zip(wanted);
    got.all(|(v, (wanted, tolerance))| (v as f64 - wanted).abs() <= tolerance)
}

fn judge_json(name: &str, file: &Json) -> Vec<bool> {
    let (asked, scheme) = (file.get("operation").text(), numbers_of(file.get("scheme")));
    let Some((_, operation)) = OPERATIONS.iter().find(|(one, _)| *one == asked) else {
        println!("{name}: its cases are not asked, as {asked} is not implemented here");
        return Vec::new();
    };
    let Json::List(cases) = file.get("cases") else { panic!("no cases") };
    let judged = |case: &Json| {
        let mut request = arrays_of(case.get("inputs"));
        request.insert("scheme".into(), scheme.clone());
        match operation(&request) {
            Ok(result) => {
                case.get("result").text() == "done" && agrees(&result, &arrays_of(case.get("expected")))
            }
            Err(_) => case.get("result").text() == "refused",
        }
    };
    cases.iter().map(judged).collect()
}

/// A file of safetensors: the size of a header of JSON, the header, and the bytes of all arrays.
fn judge_large(file: &[u8]) -> Vec<bool> {
    let start = 8 + u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    let header = Json::read(&file[8..start]);
    let about = Json::read(header.get("__metadata__").get("nsq_vector").text().as_bytes());
    let mut arrays = Frame::new();
    for (name, one) in header.object().iter().filter(|(name, _)| *name != "__metadata__") {
        let (dtype, ends) = (dtype_of(one.get("dtype").text()), one.get("data_offsets").sizes());
        let data = file[start + ends[0]..start + ends[1]].to_vec();
        arrays.insert(name.clone(), Array { dtype, shape: one.get("shape").sizes(), data });
    }
    let scheme = numbers_of(about.get("scheme"));
    let (x, x_hat) = (arrays.remove("x").expect("x"), arrays.remove("x_hat").expect("x_hat"));
    let sizes: Vec<i32> = x.shape.iter().map(|&size| size as i32).collect();
    let mut parts = arrays.clone();
    parts.insert("scheme".into(), scheme.clone());
    parts.insert("shape".into(), Array::of_ints(&sizes, &[sizes.len()]));
    let encoded = Frame::from([("scheme".into(), scheme), ("x".into(), x)]);
    let requests = [(encoded, arrays), (parts, Frame::from([("x_hat".into(), x_hat)]))];
    let judged = |((_, operation), (request, expected)): (&(_, fn(&Frame) -> _), &(Frame, Frame))| {
        let result: Result<Frame, String> = operation(request);
        result.is_ok_and(|result| agrees(&result, expected))
    };
    OPERATIONS.iter().zip(&requests).map(judged).collect()
}

pub fn judge(folder: &str) -> io::Result<()> {
    let manifest = Json::read(&fs::read(format!("{folder}/manifest.json"))?);
    let mut outcomes = Vec::new();
    for name in manifest.get("files").object().keys() {
        let file = fs::read(format!("{folder}/{name}"))?;
        let is_json = name.ends_with(".json");
        outcomes.extend(if is_json { judge_json(name, &Json::read(&file)) } else { judge_large(&file) });
    }
    let passed = outcomes.iter().filter(|good| **good).count();
    println!("{passed} passed, {} failed", outcomes.len() - passed);
    process::exit((passed < outcomes.len()) as i32);
}
