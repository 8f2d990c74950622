// Compiled, not run: every call that brings or answers tensors, in the types that openapi-typescript made.
import type { components, operations, paths } from "./generated";

type Json<Body> = Body extends { content: { "application/json": infer Document } } ? Document : never;
type Sent<Name extends keyof operations> = Json<NonNullable<operations[Name]["requestBody"]>>;
type Answered<Name extends keyof operations> = Json<
  operations[Name] extends { responses: { 200: infer Answer } } ? Answer : never
>;

const layer: Sent<"create_layer"> = { num_features: 2 };
const population: Sent<"create_layer"> = { num_features: 2, statistics: "population", momentum: null };
const update: Sent<"update_layer"> = { momentum: null };
// @ts-expect-error: null is refused for eps
const refused: Sent<"update_layer"> = { eps: null };
const batch: Sent<"train"> & Sent<"eval"> & Sent<"inverse"> = { input: [[1, 2], [3, "NaN"]] };
const images: Sent<"train"> = { input: [[[[1, 2]], [[3, 4]]]] };
const gradients: Sent<"backward"> = { input: [[1, 2]], grad_output: [[1, 2]] };
const moments: Sent<"fold_moments"> = { count: 2, mean: [1, 2], var: [1, "Infinity"] };
const many: Sent<"fold_many_moments"> = { layers: { bn: moments } };
const state: Sent<"replace_state"> = { running_mean: [1, 2], num_batches_tracked: 3 };
const bytes: NonNullable<operations["train"]["requestBody"]> = {
  content: { "application/vnd.safetensors": "", "application/x-npy": "", "application/json": batch },
};

declare const trained: Answered<"train">;
declare const inspected: Answered<"get_state">;
const output: unknown[][] = trained.output;
const mean: components["schemas"]["Vector"] | undefined = inspected.running_mean;
const path: keyof paths = "/v1/layers/{name}/train";
export { batch, bytes, gradients, images, layer, many, mean, moments, output, path, population, refused, state, update };
