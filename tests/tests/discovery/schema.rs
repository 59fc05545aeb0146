// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The names in our types, and in the output of our back-ends, match the schema.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use qapi_parser::Parser;
use qapi_parser::spec::{Data, DataOrType, Spec};
use serde::Serialize;
use serde_json::{Value, json};
use vhost_device_tests::process;
use vhost_user_discovery::schema::{
    VHostUserBackendBlockFeature, VHostUserBackendCapabilities, VHostUserBackendGPUFeature,
    VHostUserBackendInputFeature, VHostUserBackendType, VhostUserBackend,
};

use crate::run;

/// `discovery/schema/vhost-user.json`.
struct Schema {
    enums: BTreeMap<String, Vec<String>>,
    structs: BTreeMap<String, Data>,
    /// Branches of the one union.
    branches: Data,
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

impl Schema {
    fn read() -> Self {
        let file = workspace().join("discovery/schema/vhost-user.json");
        let text = Parser::strip_comments(&fs::read_to_string(file).unwrap());
        let mut schema = Self {
            enums: BTreeMap::new(),
            structs: BTreeMap::new(),
            branches: Data::default(),
        };
        for spec in Parser::from_string(text) {
            match spec.unwrap() {
                Spec::Enum(names) => {
                    let values = names.data.iter().map(|name| name.to_string());
                    schema.enums.insert(names.id, values.collect());
                }
                Spec::Struct(fields) => {
                    schema.structs.insert(fields.id, fields.data);
                }
                Spec::CombinedUnion(union) => {
                    assert_eq!(union.id, "VHostUserBackendCapabilities");
                    assert_eq!(union.discriminator.as_deref(), Some("type"));
                    let DataOrType::Data(base) = union.base else {
                        panic!("the base should be listed: {:?}", union.base);
                    };
                    assert_eq!(keys(&base), ["type"]);
                    assert_eq!(base.fields[0].ty.name, "VHostUserBackendType");
                    schema.branches = union.data;
                }
                other => panic!("{other:?}"),
            }
        }
        schema
    }

    /// Returns the names of the features that a device of type `kind` may have.
    fn features(&self, kind: &str) -> &[String] {
        // The union has no branch for block, for which there is a struct.
        let branch = match kind {
            "block" => "VHostUserBackendCapabilitiesBlock",
            _ => match self.branches.fields.iter().find(|field| field.name == kind) {
                Some(branch) => &branch.ty.name,
                None => return &[],
            },
        };
        let [features] = self.structs[branch].fields.as_slice() else {
            panic!("{branch} should have one field");
        };
        assert_eq!(features.name, "features");
        assert!(features.ty.is_array && !features.optional);
        &self.enums[&features.ty.name]
    }

    /// Asserts that the output of a back-end is an object of the schema.
    fn assert_capabilities(&self, printed: &Value) {
        let object = printed.as_object().unwrap();
        assert_eq!(object.keys().collect::<Vec<_>>(), ["features", "type"]);
        let kind = printed["type"].as_str().unwrap();
        let known = self.features(kind);
        for feature in printed["features"].as_array().unwrap() {
            let feature = feature.as_str().unwrap();
            assert!(known.iter().any(|known| known == feature), "{printed}");
        }
    }

    fn assert_descriptor(&self, printed: &Value) {
        let object = printed.as_object().unwrap();
        let fields = &self.structs["VhostUserBackend"].fields;
        for field in fields {
            let Some(value) = object.get(&field.name) else {
                assert!(field.optional, "{} is missing", field.name);
                continue;
            };
            let values = match value {
                Value::Array(values) if field.ty.is_array => values.as_slice(),
                value => std::slice::from_ref(value),
            };
            assert_eq!(value.is_array(), field.ty.is_array, "{}", field.name);
            assert!(values.iter().all(Value::is_string), "{}", field.name);
        }
        let known = |key: &String| fields.iter().any(|field| field.name == *key);
        assert!(object.keys().all(known), "{printed}");
        assert!(Path::new(printed["binary"].as_str().unwrap()).is_absolute());
    }
}

fn keys(data: &Data) -> Vec<&str> {
    data.fields.iter().map(|field| &*field.name).collect()
}

/// Returns the serde names of all values of an enum.
fn in_json(values: &[impl Serialize]) -> Vec<String> {
    let value = |value| serde_json::from_value(serde_json::to_value(value).unwrap()).unwrap();
    values.iter().map(value).collect()
}

#[test]
fn our_enums_have_the_names_of_the_schema() {
    let mut enums = Schema::read().enums;
    macro_rules! check {
        ($($name:ident)*) => {$(
            let names = enums.remove(stringify!($name)).unwrap();
            assert_eq!(in_json($name::ALL), names);
            for (value, name) in $name::ALL.iter().zip(&names) {
                assert_eq!(value.name(), name);
                assert_eq!($name::from_name(name), Some(*value));
            }
            assert_eq!($name::from_name("gpio"), None);
        )*};
    }
    check! {
        VHostUserBackendType VHostUserBackendBlockFeature VHostUserBackendInputFeature VHostUserBackendGPUFeature
    }
    assert_eq!(enums.keys().next(), None, "not among our types");
    assert_eq!(VHostUserBackendType::ALL.len(), 15);
}

#[test]
fn our_structs_have_the_keys_of_the_schema() {
    let schema = Schema::read();
    let descriptor = VhostUserBackend {
        description: "a disk".into(),
        r#type: "block".into(),
        binary: "/disk".into(),
        tags: vec!["tag".into()],
    };
    let descriptor = serde_json::to_value(descriptor).unwrap();
    schema.assert_descriptor(&descriptor);
    assert_eq!(
        descriptor.as_object().unwrap().len(),
        schema.structs["VhostUserBackend"].fields.len()
    );
    let capabilities = VHostUserBackendCapabilities {
        r#type: "gpu".into(),
        features: Some(in_json(VHostUserBackendGPUFeature::ALL)),
    };
    schema.assert_capabilities(&serde_json::to_value(capabilities).unwrap());
}

#[test]
fn capabilities_of_all_kinds_are_read() {
    for (text, features) in [
        (json!({"type": "rng"}), None),
        (json!({"type": "fs", "features": []}), Some(vec![])),
        (json!({"type": "gpio", "features": ["x"]}), Some(vec!["x"])),
        (
            json!({"type": "gpu", "features": ["virgl", "venus"], "more": {}}),
            Some(vec!["virgl", "venus"]),
        ),
    ] {
        let read: VHostUserBackendCapabilities = serde_json::from_value(text.clone()).unwrap();
        assert_eq!(read.r#type, text["type"]);
        let features = features.map(|names| names.into_iter().map(String::from).collect());
        assert_eq!(read.features, features);
    }
}

#[test]
fn our_back_ends_print_output_that_matches_the_schema() {
    let schema = Schema::read();
    let types = &schema.enums["VHostUserBackendType"];
    let mut seen = Vec::new();
    for folder in fs::read_dir(workspace()).unwrap() {
        let folder = folder.unwrap();
        let name = folder.file_name().into_string().unwrap();
        if !name.starts_with("vhost-device-") || !folder.path().join("src/main.rs").exists() {
            continue;
        }
        // A device that is not built is missing.
        let Ok(binary) = process::binary(&name) else {
            continue;
        };
        let print = |option: &str| -> Value {
            let ended = run(Command::new(&binary).arg(option));
            assert_eq!(ended.code, Some(0), "{name} {option}: {}", ended.stderr);
            serde_json::from_str(&ended.stdout).unwrap()
        };
        let capabilities = print("--print-capabilities");
        let descriptor = print("--print-descriptor");
        schema.assert_capabilities(&capabilities);
        schema.assert_descriptor(&descriptor);
        assert_eq!(capabilities["type"], descriptor["type"]);
        let kind = descriptor["type"].as_str().unwrap();
        assert_eq!(name, format!("vhost-device-{kind}"));
        // The schema has no type for some devices; the others are named as in the schema.
        if !["gpio", "i2c", "scmi", "sound", "media", "video"].contains(&kind) {
            assert!(types.iter().any(|known| known == kind), "{kind}");
        }
        seen.push(kind.to_owned());
    }
    assert!(seen.iter().any(|kind| kind == "block"), "{seen:?}");
}
