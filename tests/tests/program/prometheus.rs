// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A strict parser for Prometheus' text format, version 0.0.4, which panics on any violation.

use std::collections::{BTreeMap, HashSet};

/// Labels of a sample, by name.
type Labels = BTreeMap<String, String>;

/// A page of metrics.
pub struct Page {
    samples: Vec<(String, Labels, f64)>,
}

/// A metric: its name, its type, and its samples.
struct Family {
    name: String,
    kind: String,
    samples: Vec<(String, Labels, f64)>,
}

impl Page {
    pub fn parse(text: &str) -> Self {
        assert!(text.ends_with('\n'), "the last line has no end: {text:?}");
        let mut families: Vec<Family> = Vec::new();
        let mut help: Option<&str> = None;
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, text) = rest.split_once(' ').expect("a help text");
                assert!(help.is_none() && !text.trim().is_empty(), "{line}");
                help = Some(name);
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("a type");
                assert_eq!(help.take(), Some(name), "help comes before the type");
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert!(families.iter().all(|family| family.name != name), "{line}");
                check_name(name, true);
                families.push(Family {
                    name: name.to_owned(),
                    kind: kind.to_owned(),
                    samples: Vec::new(),
                });
            } else {
                assert!(help.is_none(), "a sample between help and type: {line}");
                let family = families.last_mut().expect("a type before a sample");
                family.samples.push(sample(line));
            }
        }
        let mut known = HashSet::new();
        for family in &families {
            family.check();
            for (name, labels, _) in &family.samples {
                assert!(known.insert((name, labels)), "{name}{labels:?} comes twice");
            }
        }
        Self {
            samples: families
                .into_iter()
                .flat_map(|family| family.samples)
                .collect(),
        }
    }

    /// Returns the sum of all samples of this name that have these labels, and perhaps others.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let found = self.samples.iter().filter(|(sample, has, _)| {
            let is =
                |(label, value): &(&str, &str)| has.get(*label).is_some_and(|has| has == value);
            sample == name && labels.iter().all(is)
        });
        // An empty sum of floats is -0.
        found.map(|(.., value)| value).sum::<f64>() + 0.0
    }
}

impl Family {
    fn check(&self) {
        let name = &self.name;
        match self.kind.as_str() {
            "histogram" => self.check_histogram(),
            kind => {
                assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
                assert!(self.samples.iter().all(|(sample, ..)| sample == name));
            }
        }
        let counts = self.samples.iter().all(|(.., value)| *value >= 0.0);
        assert!(counts, "a counter of {name} is below 0");
    }

    /// Asserts that each series has its buckets in order, then its sum and count.
    fn check_histogram(&self) {
        let mut samples = self.samples.iter().peekable();
        while samples.peek().is_some() {
            let mut last = (f64::NEG_INFINITY, 0.0);
            let mut series = None;
            while let Some((_, labels, count)) =
                samples.next_if(|(name, ..)| *name == format!("{}_bucket", self.name))
            {
                let mut labels = labels.clone();
                let bound: f64 = labels.remove("le").expect("a bound").parse().unwrap();
                assert!(
                    bound > last.0 && *count >= last.1,
                    "{}: {labels:?}",
                    self.name
                );
                assert_eq!(*series.get_or_insert_with(|| labels.clone()), labels);
                last = (bound, *count);
            }
            let series = series.expect("a bucket comes first");
            assert_eq!(last.0, f64::INFINITY, "the last bucket of {series:?}");
            for (ending, value) in [("sum", None), ("count", Some(last.1))] {
                let (name, labels, found) = samples.next().expect("a sum and a count");
                assert_eq!(
                    (name, labels),
                    (&format!("{}_{ending}", self.name), &series)
                );
                assert!(
                    value.is_none_or(|value| value == *found),
                    "{name}{labels:?}"
                );
            }
        }
    }
}

fn check_name(name: &str, colons: bool) {
    let may = |place: usize, character: char| {
        character.is_ascii_alphabetic()
            || character == '_'
            || (colons && character == ':')
            || (place > 0 && character.is_ascii_digit())
    };
    let all = name
        .chars()
        .enumerate()
        .all(|(place, character)| may(place, character));
    assert!(!name.is_empty() && all, "{name:?} is no name");
}

/// Reads `name{label="value",…} number`.
fn sample(line: &str) -> (String, Labels, f64) {
    let (series, value) = line.rsplit_once(' ').expect("a value");
    let (name, labels) = match series.split_once('{') {
        None => (series, ""),
        Some((name, rest)) => (name, rest.strip_suffix('}').expect("the end of the labels")),
    };
    check_name(name, true);
    let mut all = Labels::new();
    for label in labels.split_terminator(',') {
        let (label, value) = label.split_once('=').expect("a label's value");
        check_name(label, false);
        let value = value
            .strip_prefix('"')
            .and_then(|value| value.strip_suffix('"'));
        let value = value.expect("a value in quotes");
        assert!(!value.contains(['"', '\\']), "{line}");
        assert!(
            all.insert(label.to_owned(), value.to_owned()).is_none(),
            "{line}"
        );
    }
    let value = value
        .parse()
        .unwrap_or_else(|_| panic!("no number: {line}"));
    (name.to_owned(), all, value)
}
