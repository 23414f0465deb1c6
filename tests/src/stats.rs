//! The JSON of `--stats`, with names for what tests ask of it.

use std::path::Path;

use serde_json::Value;

/// What the machine counted.
#[derive(Clone, Debug)]
pub struct Stats(pub Value);

impl Stats {
    /// Reads the file; `None` when the machine wrote none.
    ///
    /// # Panics
    /// When it is no JSON.
    #[must_use]
    pub fn read(path: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(path).ok().filter(|text| !text.is_empty())?;
        Some(Self::parse(&text))
    }

    /// From JSON.
    ///
    /// # Panics
    /// When it is none.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        Self(serde_json::from_str(text).unwrap_or_else(|error| panic!("--stats is no JSON: {error}\n{text}")))
    }

    /// A number by JSON pointer, such as `/devices/0/requests_through_vmm`.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn number(&self, pointer: &str) -> u64 {
        let found = self.0.pointer(pointer).and_then(Value::as_u64);
        found.unwrap_or_else(|| panic!("--stats has no number {pointer}:\n{:#}", self.0))
    }

    /// A text by JSON pointer.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn text(&self, pointer: &str) -> &str {
        let found = self.0.pointer(pointer).and_then(Value::as_str);
        found.unwrap_or_else(|| panic!("--stats has no text {pointer}:\n{:#}", self.0))
    }

    /// All exits to userspace.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.number("/exits")
    }

    /// Reads and writes that left the guest and KVM at the range called `name`.
    ///
    /// # Panics
    /// When there is no such range.
    #[must_use]
    pub fn range(&self, name: &str) -> (u64, u64) {
        let ranges = self.0.pointer("/ranges").and_then(Value::as_array);
        let range = ranges.and_then(|ranges| ranges.iter().find(|range| range["name"] == name));
        let range = range.unwrap_or_else(|| panic!("--stats has no range {name}:\n{:#}", self.0));
        (range["reads"].as_u64().unwrap(), range["writes"].as_u64().unwrap())
    }
}
