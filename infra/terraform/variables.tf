variable "region" {
  description = "Where the bucket lies: the region of the machines that train, as traffic between regions is slow and paid for."
  type        = string
}

variable "bucket" {
  description = "Name of the bucket; made here."
  type        = string
}

variable "prefix" {
  description = "The store is s3://<bucket>/<prefix>: VC2_STORE. Empty: the whole bucket."
  type        = string
  default     = "vc2"

  validation {
    condition     = !startswith(var.prefix, "/") && !endswith(var.prefix, "/")
    error_message = "The prefix begins and ends without a slash."
  }
}

variable "kms_key_arn" {
  description = "A key of your own for encryption at rest; empty: the one of S3."
  type        = string
  default     = ""
}

variable "oidc_provider_arn" {
  description = "OIDC provider of the EKS cluster, for roles by service account. Empty: roles may be taken by trusted_principals only."
  type        = string
  default     = ""
}

variable "oidc_issuer" {
  description = "Its issuer, without https://."
  type        = string
  default     = ""
}

variable "namespace" {
  description = "Namespace of infra/kubernetes, whose service accounts may take the roles."
  type        = string
  default     = "vc2"
}

variable "trusted_principals" {
  description = "ARNs of who else may take the roles, such as the role of the machines of a Slurm cluster."
  type        = list(string)
  default     = []
}

variable "readers" {
  description = "ARNs of who may read finished artifacts and nothing else."
  type        = list(string)
  default     = []
}
