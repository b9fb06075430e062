terraform {
  required_version = ">= 1.5"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.60, < 6.0"
    }
  }
  # State holds no secret here, but tells who may do what: keep it in a bucket of its own, encrypted and locked.
  # backend "s3" {}
}

provider "aws" {
  region = var.region
  default_tags {
    tags = { project = "vc2" }
  }
}
